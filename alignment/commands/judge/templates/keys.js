// Keys press the buttons that name them. A form is sent once: a second key before the next page has come does nothing,
// and neither does a key that is held down.
"use strict";
let sent = false;
addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
addEventListener("pageshow", () => { sent = false; });
addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input")) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button === null || button.disabled) return;
  event.preventDefault();
  button.click();
});
