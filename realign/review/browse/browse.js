"use strict";
// Sends decisions, and moves through the cards by keys; nothing is created from text.
const cards = [...document.querySelectorAll("#pairs > article[data-key]")];
const problem = document.getElementById("problem");
const KEYS = { k: "keep", d: "drop", f: "flag" };
let current = -1;

function select(index) {
  if (index < 0 || index >= cards.length) return;
  cards[current]?.classList.remove("current");
  current = index;
  cards[current].classList.add("current");
  cards[current].focus({ preventScroll: true });
  cards[current].scrollIntoView({ block: "nearest" });
}

async function decide(card, decision) {
  const note = card.querySelector("[name=note]").value;
  const body = JSON.stringify({ number: Number(card.dataset.number), key: card.dataset.key, decision, note });
  let answer;
  try {
    answer = await fetch("/decide", { method: "POST", headers: { "content-type": "application/json" }, body });
  } catch {
    return fail("Not saved: the server does not answer. Is `realign browse` still running?");
  }
  if (!answer.ok) return fail(`Not saved: ${await answer.text()}`);
  problem.hidden = true;
  card.dataset.decision = decision;
  for (const button of card.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.choice === decision));
  }
  const { counts } = await answer.json();
  for (const [status, count] of Object.entries(counts)) {
    document.querySelector(`[data-count=${status}]`).textContent = count.toLocaleString("en");
  }
  return true;
}

function fail(text) {
  problem.textContent = text;
  problem.hidden = false;
  return false;
}

cards.forEach((card, index) => {
  card.addEventListener("click", (event) => {
    select(index);
    const choice = event.target.dataset.choice;
    if (choice) decide(card, choice);
    if (event.target.matches("input")) event.target.focus();
  });
  const note = card.querySelector("[name=note]");
  note.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") card.focus();
  });
  // a changed note belongs to the decision that is already there
  note.addEventListener("change", () => {
    if (card.dataset.decision !== "undecided") decide(card, card.dataset.decision);
  });
});

document.addEventListener("keydown", async (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const card = cards[current];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    select(current + (event.key === "ArrowDown" ? 1 : -1));
  } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    document.querySelector(`a[rel=${event.key === "ArrowRight" ? "next" : "prev"}]`)?.click();
  } else if (event.key === "n" && card) {
    event.preventDefault();
    card.querySelector("[name=note]").focus();
  } else if (event.key in KEYS && card) {
    if (await decide(card, KEYS[event.key])) select(cards.indexOf(card) + 1);
  }
});

document.getElementById("filters").addEventListener("change", (event) => event.currentTarget.submit());
select(0);
