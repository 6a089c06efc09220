// Follows the run: asks how it is, and takes over a new report in place, with its open details. It never reloads the
// page, so that a reader stays where the page is.
"use strict";
const EVERY = 2000;
const parsed = (text) => new DOMParser().parseFromString(text, "text/html");
const label = (details) => details.querySelector("summary")?.textContent ?? "";

async function text(path) {
  const answer = await fetch(path, { cache: "no-store" });
  return parsed(await answer.text());
}

function takeOver(page) {
  const before = document.querySelector("main");
  const after = page.querySelector("main");
  if (after === null) return;
  const known = new Map([...document.querySelectorAll("main details")].map((details) => [label(details), details.open]));
  for (const details of after.querySelectorAll("details")) details.open = known.get(label(details)) ?? details.open;
  if (before === null) document.body.append(after);
  else before.replaceWith(after);
  document.body.dataset.revision = page.body.dataset.revision;
}

async function look() {
  let over = false;
  try {
    const status = (await text("status")).querySelector("#status");
    document.querySelector("#status").replaceWith(status);
    document.title = status.dataset.title;
    over = status.dataset.over === "yes";
    if (status.dataset.revision !== "" && status.dataset.revision !== document.body.dataset.revision) {
      takeOver(await text("./"));
    }
  } catch {
    const note = document.querySelector("#status .note");
    if (note !== null) note.textContent = "align watch no longer answers, so this page may be out of date";
  }
  if (!over) setTimeout(look, EVERY);
}

setTimeout(look, EVERY);
