/** The history as a row of images; each is shown again, or deleted. */
import { make } from "./viz/dom.js";
import { MOST_RUNS } from "./history.js";
import { urlOf } from "./urls.js";

const byId = (id) => document.getElementById(id);

/** Shows what the history holds; `shown` is the run on the stage. */
export function showPast(history, shown, { onShow, onDelete }) {
  const runs = history.shown.filter((run) => run.picture !== null);
  byId("past-card").hidden = runs.length === 0;
  byId("past-text").textContent = history.isKept
    ? `The latest ${MOST_RUNS} images at most, in this browser alone.`
    : "This browser stores nothing, so these last until the page is closed.";
  byId("past").replaceChildren(...runs.map((run) => entry(run, run.id === shown?.id, { onShow, onDelete })));
}

function entry(run, isNow, { onShow, onDelete }) {
  const said = `${run.prompt}, seed ${run.seed}, ${run.title}`;
  return make(
    "li",
    {},
    make(
      "button",
      { type: "button", class: "sv-pastone", "aria-pressed": String(isNow), title: said, onclick: () => onShow(run) },
      make("img", { src: urlOf(run.picture), alt: "", loading: "lazy", decoding: "async" }),
      make("span", {}, run.prompt),
      make("i", { class: "sv-hidden" }, `, seed ${run.seed}, `),
      make("small", {}, run.title),
    ),
    make(
      "button",
      { type: "button", class: "sv-delete", "aria-label": `Delete: ${said}`, onclick: () => onDelete(run) },
      "\u00d7",
    ),
  );
}
