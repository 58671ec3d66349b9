/** What went wrong, in a box above the image, with a button that waits as long as the server asked. */
import { make } from "./viz/dom.js";

const byId = (id) => document.getElementById(id);
let timer = null;

/** Shows a notice of words.js; `onRetry` is null where trying again helps nothing; an automatic one waits for no click. */
export function showNotice({ title, text, waitS, isAutomatic = false }, onRetry) {
  hideNotice();
  byId("notice").hidden = false;
  byId("notice-text").replaceChildren(make("b", {}, title), " ", text);
  if (onRetry === null) return;
  const button = make("button", { type: "button", class: "sv-button", onclick: onRetry }, "Try again");
  byId("notice").append(button);
  if (waitS !== null && waitS > 0) countDown(button, Date.now() + 1000 * waitS, isAutomatic);
}

/** Takes it away. */
export function hideNotice() {
  clearInterval(timer);
  byId("notice").hidden = true;
  byId("notice-text").replaceChildren();
  byId("notice").querySelector("button")?.remove();
}

function countDown(button, until, isAutomatic) {
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) return;
    clearInterval(timer);
    if (isAutomatic) button.click();
  };
  tick();
  timer = setInterval(tick, 250);
}
