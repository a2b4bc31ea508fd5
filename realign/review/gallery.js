"use strict";
// Sorts and filters the cards of the gallery; nothing is created from text.
const form = document.getElementById("filters");
const place = document.getElementById("pairs");
const cards = [...place.children].map((card) => ({
  card,
  text: card.textContent.toLowerCase(),
  reasons: JSON.parse(card.dataset.reasons),
}));

function number(card, name) {
  return name in card.dataset ? Number(card.dataset[name]) : null;
}

function isShown({ card, text, reasons }, asked) {
  const similarity = number(card, "similarity");
  if (asked.text && !asked.text.toLowerCase().split(/\s+/).every((word) => text.includes(word))) return false;
  if (asked.least && !(similarity !== null && similarity >= Number(asked.least))) return false;
  if (asked.most && !(similarity !== null && similarity <= Number(asked.most))) return false;
  if (asked.rank && card.dataset.rank !== asked.rank) return false;
  if (asked.reason && !reasons.includes(asked.reason)) return false;
  return !asked.decision || card.dataset.decision === asked.decision;
}

function update() {
  const asked = Object.fromEntries(new FormData(form));
  const name = asked.sort.replace("-", "");
  const sign = asked.sort.startsWith("-") ? -1 : 1;
  cards.sort((a, b) => {
    const [x, y] = [number(a.card, name), number(b.card, name)];
    if (x === null || y === null) return (x === null) - (y === null); // what has no value comes last
    return sign * (x - y) || number(a.card, "index") - number(b.card, "index");
  });
  let shown = 0;
  for (const entry of cards) {
    entry.card.hidden = !isShown(entry, asked);
    shown += !entry.card.hidden;
  }
  place.append(...cards.map(({ card }) => card));
  form.elements.shown.value = `${shown} of ${cards.length}`;
  document.getElementById("nothing").hidden = shown > 0;
}

form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
update(); // a reloaded page keeps what was chosen
