"use strict";
// Sends decisions, and moves through the cards by keys; nothing is created from text.
const cards = [...document.querySelectorAll("#pairs > article[data-key]")];
const problem = document.getElementById("problem");
const undone = document.getElementById("undone");
const keys = document.getElementById("keys");
const filters = document.getElementById("filters");
const KEYS = { k: "keep", d: "drop", f: "flag" };
let current = -1;

function mark(index) {
  if (index < 0 || index >= cards.length) return false;
  cards[current]?.classList.remove("current");
  current = index;
  cards[current].classList.add("current");
  return true;
}

function select(index) {
  if (!mark(index)) return;
  cards[current].focus({ preventScroll: true });
  cards[current].scrollIntoView({ block: "nearest" });
}

let queue = Promise.resolve();

// one request at a time: an undo must not overtake the decision that it takes back
function send(address, content) {
  queue = queue.then(() => post(address, content));
  return queue;
}

async function post(address, content) {
  const body = JSON.stringify(content);
  let answer;
  try {
    answer = await fetch(address, { method: "POST", headers: { "content-type": "application/json" }, body });
  } catch {
    return fail("Not saved: the server does not answer. Is `realign browse` still running?");
  }
  if (!answer.ok) return fail(`Not saved: ${await answer.text()}`);
  problem.hidden = true;
  undone.hidden = true;
  const found = await answer.json();
  for (const [status, count] of Object.entries(found.counts)) {
    document.querySelector(`[data-count=${status}]`).textContent = count.toLocaleString("en");
  }
  return found;
}

function show(card, decision) {
  card.dataset.decision = decision;
  for (const button of card.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(button.dataset.choice === decision));
  }
}

async function decide(card, decision) {
  const note = card.querySelector("[name=note]").value;
  const sent = { number: Number(card.dataset.number), key: card.dataset.key, decision, note };
  const found = await send("/decide", sent);
  if (found) show(card, decision);
  return Boolean(found);
}

async function undo() {
  const found = await send("/undo", {});
  if (!found) return;
  const card = cards.find((one) => Number(one.dataset.number) === found.number);
  if (card) {
    show(card, found.decision);
    card.querySelector("[name=note]").value = found.note;
    select(cards.indexOf(card));
  }
  const row = undone.querySelector("a");
  row.textContent = `row ${found.id}`;
  row.href = `/?find=${encodeURIComponent(found.id)}`;
  undone.querySelector("b").textContent = found.undone;
  undone.querySelector("i").textContent = found.decision;
  undone.hidden = false;
}

function fail(text) {
  problem.textContent = text;
  problem.hidden = false;
  return null;
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
  if (keys.open) return; // its own Escape closes it
  const card = cards[current];
  const key = event.key.toLowerCase();
  if (key === "arrowdown" || key === "arrowup") {
    event.preventDefault();
    select(current + (key === "arrowdown" ? 1 : -1));
  } else if (key === "arrowright" || key === "arrowleft") {
    document.querySelector(`a[rel=${key === "arrowright" ? "next" : "prev"}]`)?.click();
  } else if (key === "?") {
    keys.showModal();
  } else if (key === "u" || key === "z") {
    undo();
  } else if (key === "n" && card) {
    event.preventDefault();
    card.querySelector("[name=note]").focus();
  } else if (key in KEYS && card) {
    if (await decide(card, KEYS[key])) select(cards.indexOf(card) + 1);
  }
});

document.getElementById("undo").addEventListener("click", undo);
document.getElementById("show-keys").addEventListener("click", () => keys.showModal());
document.getElementById("hide-keys").addEventListener("click", () => keys.close());
filters.addEventListener("change", () => filters.submit());
const isNarrow = matchMedia("(max-width: 640px)").matches;
document.getElementById("filter-box").open = !isNarrow || "filtered" in filters.dataset;
mark(0); // the page opens at its top
