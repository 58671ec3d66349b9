/** The page of `foveate serve`: it joins form, requests, stage, results and history. */
import "./viz/view.js";
import "./viz/plot.js";
import "./viz/bars.js";
import "./ladder.js";
import { ApiError, key } from "./api.js";
import { NOTHING_CHOSEN, bodyOf, chosenBy, hashOf, newSeed } from "./choice.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { mosaic } from "./mosaic.js";
import { readOffer } from "./offer.js";
import { showPast } from "./past.js";
import { hideResults, showResults } from "./results.js";
import { printMs, transformerMs } from "./run.js";
import { Session } from "./session.js";
import { Stage } from "./stage.js";
import { hideNotice, showNotice } from "./notice.js";
import { said } from "./words.js";

const SHARES = [0.9, 0.75, 0.6, 0.45, 0.3];
const byId = (id) => document.getElementById(id);

const history = await History.open();
const stage = new Stage({ onShow: (run) => display(run) });
const form = new Form({ onSubmit: () => void generate(), onStop: () => stop() });
let session = null;
let offer = null;
/** Shares that are still to be tried. */
let waiting = [];

// Requests ------------------------------------------------------------------------------------------------------------

const told = {
  accepted(event, runs) {
    if (!runs[0].isReference) stage.begin(runs);
    this.waits(event.position, runs);
  },
  waits(position, runs) {
    const what = runs[0].isReference ? "The full run waits" : "Waiting";
    const before = position === 1 ? "1 request" : `${position} requests`;
    stage.say(
      position > 0 ? `${what}: ${before} before this one` : `${runs[0].isReference ? "Full run" : "First scale"}\u2026`,
    );
  },
  scale(run, scale) {
    const of = `${scale.scale + 1} of ${run.numScales} scales`;
    if (run.isReference) stage.say(`Full run, to compare: ${of}`, true);
    else {
      stage.scale(run, scale);
      stage.say(`${of}: ${scale.rows} \u00d7 ${scale.columns} tokens, ${printMs(scale.ms)}`, true);
      byId("scales-text").textContent = stage.about();
    }
  },
  done(run) {
    const { shown } = stage;
    if (run.isReference ? shown?.key === run.key && shown.done : shown === null || run === shown) show(shown ?? run);
    past();
  },
  failed(error, runs, again) {
    stopped(error, runs, again);
  },
  ended() {
    form.isRunning = false;
  },
};

async function generate() {
  if (session === null) return void greet();
  if (!form.check()) return;
  hideNotice();
  waiting = [];
  form.reseed();
  const { choice } = form;
  const body = bodyOf(choice);
  window.history.replaceState(null, "", `#${hashOf(choice)}`);
  hideResults();
  stage.say("Asking\u2026");
  form.isRunning = true;
  await go(() => session.start(body));
}

/** Runs a request to its end, and then the full run, if that is wanted. */
async function go(start) {
  const [run] = await start();
  if (run.picture === null || session.isRunning) return;
  if (!run.isReference && byId("compares").checked && !run.isFull) await compare(run);
  else finished();
}

/** Generates the full run of an image unless it is there, and shows both. */
async function compare(run) {
  form.isRunning = true;
  refresh();
  if ((await session.reference(run)) !== null) finished();
}

/** The same image by other shares of the compute, one after the other. */
async function tryShares(run) {
  const { policy, budget, latency_budget_ms, on_late, ...rest } = run.body;
  hideNotice();
  waiting = SHARES.map((share) => ({ ...rest, n: 1, budget: share }));
  while (waiting.length) {
    const body = waiting.shift();
    form.isRunning = true;
    const [one] = await session.start(body, { isPaced: false });
    if (one.picture === null) waiting = [];
  }
  finished();
}

function stop() {
  waiting = [];
  session.stop();
}

function finished() {
  const run = stage.shown;
  form.isRunning = session.isRunning;
  if (run?.done && !session.isRunning) {
    stage.say(outcome(run));
    refresh();
  }
}

/** What is said of a finished run. */
function outcome(run) {
  if (run.done.isCoarse) return coarse(run);
  const waited = run.done.ms.queue > 300 ? `, after ${printMs(run.done.ms.queue)} in the queue` : "";
  return `Done: ${printMs(transformerMs(run))} for ${run.scales.length} scales${waited}`;
}

function coarse(run) {
  return `The deadline passed: this is the image after ${run.scales.length} of ${run.numScales} scales`;
}

function stopped(error, runs, again) {
  waiting = [];
  const [run] = runs;
  if (error instanceof ApiError && error.status === 401) return void askKey(() => retry(again));
  const notice = said(error, run);
  if (notice.field !== null) form.complain(notice.field, notice.text);
  refresh();
  stage.say("");
  showNotice(notice, notice.canRetry ? () => void retry(again) : null);
}

async function retry(again) {
  hideNotice();
  stage.say("Asking\u2026");
  form.isRunning = true;
  await go(again);
}

// What is shown -------------------------------------------------------------------------------------------------------

function show(run) {
  stage.show(run, history.reference(run));
  refresh();
  past();
}

/** A run that the reader chose; the status line stays with a request that is under way. */
function display(run) {
  show(run);
  if (!session?.isRunning) stage.say(outcome(run));
}

/** Numbers and plots of what is on the stage. */
function refresh() {
  const run = stage.shown;
  if (run === null || run.done === null) return;
  void showResults(run, {
    reference: history.reference(run),
    siblings: history.siblings(run),
    isRunning: session?.isRunning ?? false,
    onCompare: () => void compare(run),
    onTry: () => void tryShares(run),
  });
  showWarnings(run);
}

function showWarnings(run) {
  const { warnings, isCoarse } = run.done;
  const lines = [...(isCoarse ? [coarse(run)] : []), ...warnings.map((one) => one.message)];
  byId("warnings").hidden = lines.length === 0;
  byId("warnings").replaceChildren(
    ...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })),
  );
}

function past() {
  showPast(history, stage.shown, {
    onShow(run) {
      hideNotice();
      display(run);
      byId("stage").scrollIntoView({ block: "start" });
    },
    async onDelete(run) {
      await history.delete(run.id);
      if (stage.shown?.id === run.id) reset();
      past();
      (byId("past").querySelector("button") ?? byId("prompt")).focus();
    },
  });
}

function reset() {
  stage.clear();
  hideResults();
}

async function forget() {
  await history.clear();
  reset();
  past();
  byId("prompt").focus();
}

// API key, links, theme -----------------------------------------------------------------------------------------------

function askKey(again) {
  const dialog = byId("key-dialog");
  byId("key-text").textContent = key.get()
    ? "The server refused this key."
    : "This server answers to those who have a key.";
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  stage.say("The server wants an API key");
  dialog.onclose = () => {
    if (dialog.returnValue === "use") void again();
  };
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages without https may not write to the clipboard in this way.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1500);
}

function toggleTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("foveate-theme", root.dataset.theme);
  } catch {
    // The choice lasts until the page is closed.
  }
}

function linkOf(run) {
  const { body } = run;
  const preset = offer.presets.find(({ name }) => name === body.policy);
  const level =
    body.budget !== undefined ? "share" : body.policy === "full" ? "full" : preset ? `preset:${preset.name}` : "own";
  const chosen = {
    ...NOTHING_CHOSEN,
    prompt: body.prompt,
    negative: body.negative_prompt ?? "",
    level,
    share: Math.round(100 * (body.budget ?? 0.6)),
    own: level === "own" ? body.policy : "",
    size: run.size,
    seed: run.seed,
    guidance: String(body.guidance_scale ?? ""),
    temperature: String(body.temperature ?? ""),
  };
  return new URL(`#${hashOf(chosen)}`, document.baseURI).href;
}

// Start ---------------------------------------------------------------------------------------------------------------

function listen() {
  byId("theme").addEventListener("click", toggleTheme);
  byId("forget").addEventListener("click", () => void forget());
  byId("link").addEventListener("click", (event) => void copy(linkOf(stage.shown), event.currentTarget));
  byId("tried").addEventListener("foveate-pick", (event) => {
    display(history.get(event.detail));
  });
  byId("size").addEventListener("change", schedule);
  window.addEventListener("hashchange", () => {
    if (offer === null) return;
    form.choice = { ...form.choice, ...chosenBy(location.hash) };
    schedule();
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => void copy(byId(button.dataset.copy).textContent, button));
  }
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(byId("key").value.trim());
    byId("key-dialog").close("use");
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
}

/** The scales of the chosen size, in the ladder and in the sentences above. */
function schedule() {
  const size = offer.sizes.find((one) => one.size === byId("size").value) ?? offer.sizes[0];
  if (!stage.shown) byId("ladder").grids = size.grids;
  const [rows, columns] = size.grids.at(-1);
  const late = size.grids.slice(-2).reduce((sum, [h, w]) => sum + h * w, 0);
  byId("last-grid").textContent = `${(rows * columns).toLocaleString("en")} (${rows}\u2009\u00d7\u2009${columns})`;
  byId("last-share").textContent =
    `the last two of ${size.grids.length} hold ${Math.round((100 * late) / size.tokens)} % of all tokens`;
}

async function greet() {
  try {
    offer = await readOffer();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return askKey(greet);
    stage.say("");
    return showNotice({ ...said(error), isAutomatic: true }, () => (hideNotice(), void greet()));
  }
  byId("model").textContent = offer.model;
  session = new Session({ history, model: offer.weights, told });
  form.offer({
    ...offer,
    onExample(prompt) {
      form.choice = { ...form.choice, prompt };
      void generate();
    },
  });
  const level = offer.presets.find((one) => one.isMeasured && one.name.includes("balanced"))?.name;
  const linked = chosenBy(location.hash);
  const size = offer.sizes.find((one) => one.is_default).size;
  form.choice = { ...form.choice, size, level: level ? `preset:${level}` : "share", seed: newSeed(), ...linked };
  schedule();
  stage.say("");
  document.documentElement.dataset.ready = "";
}

byId("empty").prepend(mosaic());
listen();
past();
await greet();
