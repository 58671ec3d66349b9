/** Numbers, plots and the commands of the run that is shown. */
import { make } from "./viz/dom.js";
import { fidelity } from "./fidelity.js";
import { printMs, printShare, transformerMs } from "./run.js";
import { urlOf } from "./urls.js";

const byId = (id) => document.getElementById(id);
const EQUAL_DB = 100;
/** Above this an eye sees no difference, and the axis ends. */
const CEILING_DB = 55;

let turn = 0;

/**
 * Shows everything that is known of a run.
 *
 * @param {object} run
 * @param {{ reference: object | null, siblings: object[], onCompare: () => void, onTry: () => void }} around
 */
export async function showResults(run, around) {
  turn += 1;
  const mine = turn;
  const { reference, siblings } = around;
  const measured = await Promise.all(siblings.map(async (one) => [one, await fidelity(one, reference)]));
  if (mine !== turn) return;
  const db = measured.find(([one]) => one.id === run.id)?.[1] ?? null;
  figures(run, { ...around, db });
  bars(run, reference);
  tried(
    run,
    reference,
    measured.filter(([one, value]) => !one.isFull && value !== null),
    around,
  );
  byId("charts").hidden = run.isFull && reference === null && !run.scales.length;
  again(run);
}

/** Takes everything away, for a run that begins. */
export function hideResults() {
  turn += 1;
  byId("figures").replaceChildren();
  for (const id of ["charts", "again"]) byId(id).hidden = true;
}

function figure(name, value, text, ...more) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), make("small", {}, text), ...more));
}

function figures(run, { reference, db, onCompare, isRunning }) {
  const { flops, tokens } = run.done;
  const share = Math.round((100 * flops.run) / flops.full);
  const told = [
    figure("FLOPs", `${share} %`, printShare(flops.run, flops.full)),
    figure("Time", printMs(transformerMs(run)), timeText(run, reference)),
    figure("Tokens", tokens.run.toLocaleString("en"), `of ${tokens.full.toLocaleString("en")}`),
  ];
  if (db !== null) {
    const isEqual = db >= EQUAL_DB;
    told.push(
      figure(
        "PSNR",
        isEqual ? "equal" : `${db.toFixed(1)} dB`,
        isEqual ? "byte by byte, to the full run" : "to the full run",
      ),
    );
  } else if (!run.isFull && reference === null && !isRunning) {
    const button = make("button", { type: "button", class: "sv-button", onclick: onCompare }, "Generate the full run");
    told.push(make("div", { class: "sv-ask" }, make("dt", {}, "Against the full run"), make("dd", {}, button)));
  }
  byId("figures").replaceChildren(...told);
}

function timeText(run, reference) {
  if (run.isFull || reference === null) return "in the transformer";
  const ratio = transformerMs(reference) / transformerMs(run);
  return `${ratio.toFixed(2)}x speedup; full run ${printMs(transformerMs(reference))}`;
}

function bars(run, reference) {
  const shown = run.isFull || reference === null ? [run] : [reference, run];
  const label = `Milliseconds per scale of ${shown.map((one) => one.title).join(" and of ")}`;
  byId("bars").figure = {
    label,
    unit: "",
    aspect: 0.5,
    groups: run.scales.map((scale) => String(scale.scale)),
    titles: run.scales.map((scale) => `scale ${scale.scale}, ${scale.rows} x ${scale.columns}`),
    series: shown.map((one) => ({
      name: one.title,
      tone: toneOf(one),
      values: run.scales.map((scale) => [
        one.scales.find((other) => other.scale === scale.scale)?.ms ?? null,
        null,
        null,
      ]),
    })),
  };
  byId("bars-legend").replaceChildren(
    ...shown.map((one) =>
      make(
        "span",
        { class: `fv-key fv-tone-${toneOf(one)}` },
        make("i", { class: "fv-chip sv-filled-chip" }),
        `${one.title}: ${printMs(transformerMs(one))} in all`,
      ),
    ),
  );
}

function toneOf(run) {
  return run.isFull ? "control" : "0";
}

function tried(run, reference, measured, { onTry, isRunning }) {
  byId("tried-card").hidden = run.isFull || reference === null;
  if (byId("tried-card").hidden) return;
  const many = measured.length > 1;
  byId("tried-text").replaceChildren(
    "The same prompt and seed, by what was tried so far. ",
    ...(many ? ["Choose a point to see its image."] : []),
    ...(measured.length < 4 && !isRunning
      ? [make("button", { type: "button", class: "sv-button", onclick: onTry }, "Try five shares")]
      : []),
  );
  byId("tried").figure = {
    label: "PSNR to the full run over its share of FLOPs",
    aspect: 0.5,
    x: { label: "share of the full run\u2019s FLOPs (%)" },
    y: { label: "PSNR to the full run (dB)", ceiling: CEILING_DB },
    series: [
      {
        name: "tried",
        tone: "0",
        mark: "circle",
        line: null,
        points: measured.map(([one, db]) => pointOf(one, db)),
      },
    ],
  };
  byId("tried").selected = run.id;
}

function pointOf(run, db) {
  const share = (100 * run.done.flops.run) / run.done.flops.full;
  const text = db >= EQUAL_DB ? "equal, byte by byte" : `${db.toFixed(1)} dB`;
  return { id: run.id, label: run.title, text: `${share.toFixed(0)} % of the FLOPs; ${text}`, x: [share], y: [db] };
}

function again(run) {
  const { command, curl } = run.done;
  byId("again").hidden = false;
  byId("command").textContent = command;
  byId("curl").textContent = curl;
  const name = run.prompt
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40);
  const suffix = { "image/jpeg": "jpg", "image/webp": "webp" }[run.picture.type] ?? "png";
  byId("download").href = urlOf(run.picture);
  byId("download").download = `${name || "image"}-${run.seed}.${suffix}`;
}
