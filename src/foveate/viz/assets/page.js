/** The report: one chosen policy runs through tiles, frontier, images, times and table. */
import { make } from "./dom.js";
import { Gallery } from "./gallery.js";
import { legendMark } from "./plot.js";
import { makeSortable } from "./table.js";

const page = JSON.parse(document.getElementById("pg-data").textContent);
const byId = (id) => document.getElementById(id);
const NOTHING = [null, null, null, "n/a", ""];
const TONES = 6;
const MARK = { policy: "circle", control: "diamond", reference: "star", seed: "cross" };
const ROLE = { policy: "policy", control: "control", reference: "reference", seed: "another seed" };
let chosen = page.headline;

const metrics = new Map(page.metrics.map((metric) => [metric.name, metric]));
const tones = new Map();
for (const point of page.points) {
  const series = point.series ?? point.name;
  if (point.role === "policy" && !tones.has(series)) tones.set(series, String(tones.size % TONES));
}
const toneOf = (point) =>
  point.role === "policy" ? tones.get(point.series ?? point.name) : point.role === "control" ? "control" : "ink";
const figureOf = (point, name) => point.figures[name] ?? NOTHING;
const numbers = (metric, figure) => figure.slice(0, 3).map((v) => (v === null ? NaN : v * metric.factor));
const printed = (figure) => figure[3] + (figure[4] ? ` (${figure[4]})` : "");
const isBetter = (metric, a, b) => (metric.isHighGood ? a > b : a < b);

// Tiles ---------------------------------------------------------------------------------------------------------------

function tiles() {
  const point = page.points.find((one) => one.name === chosen);
  const known = page.tiles.filter((name) => name in point.figures);
  byId("pg-tiles").replaceChildren(
    ...known.map((name) => {
      const figure = figureOf(point, name);
      return make(
        "div",
        { class: "pg-tile" },
        make("span", { class: "pg-tile-name" }, metrics.get(name).label),
        make("b", {}, figure[3]),
        make("small", {}, figure[4] || "\u00a0"),
      );
    }),
  );
}

// Frontier ------------------------------------------------------------------------------------------------------------

function axisChoices(select, axis) {
  const known = page.metrics.filter(
    (m) => m.axis === axis && page.points.some((p) => Number.isFinite(figureOf(p, m.name)[0])),
  );
  select.append(...known.map((metric) => make("option", { value: metric.name }, metric.label)));
  select.addEventListener("change", frontier);
  return known.length;
}

/** The points that no other one beats in both, in the order of x. */
function undominated(points, x, y) {
  const value = (point, metric) => figureOf(point, metric.name)[0];
  const known = points.filter((p) => Number.isFinite(value(p, x)) && Number.isFinite(value(p, y)));
  const best = known.filter(
    (p) =>
      !known.some((q) => {
        const [dx, dy] = [x, y].map((m) =>
          isBetter(m, value(q, m), value(p, m)) ? 1 : value(q, m) === value(p, m) ? 0 : -1,
        );
        return dx >= 0 && dy >= 0 && dx + dy > 0;
      }),
  );
  return best.sort((a, b) => value(a, x) - value(b, x));
}

function plotted(point, x, y) {
  const [fx, fy] = [figureOf(point, x.name), figureOf(point, y.name)];
  const isBeyond = y.ceiling !== null && fy[0] >= y.ceiling;
  return {
    id: point.name,
    label: isBeyond ? `${point.name} \u2191 ${fy[3]}` : point.name,
    x: numbers(x, fx),
    y: numbers(y, fy),
    text: `${ROLE[point.role]}; ${x.label} ${printed(fx)}; ${y.label} ${printed(fy)}`,
  };
}

/** What is measured against the reference says nothing about the reference itself: that one is a line. */
function hasPlace(point, y) {
  return point.role !== "reference" || !y.isAgainstReference;
}

function frontier() {
  const [x, y] = [metrics.get(byId("pg-x").value), metrics.get(byId("pg-y").value)];
  const shown = page.points.filter((point) => hasPlace(point, y));
  const series = [];
  for (const role of ["control", "policy"]) {
    const best = undominated(
      shown.filter((point) => point.role === role),
      x,
      y,
    );
    const line = x.isHighGood === y.isHighGood ? "vh" : "hv";
    const name = role === "control" ? "best controls" : "best policies";
    const tone = role === "control" ? "control" : "0";
    series.push({ name, tone, line, isDashed: role === "control", points: best.map((p) => plotted(p, x, y)) });
  }
  for (const name of new Set(shown.map((point) => point.series).filter(Boolean))) {
    const members = shown.filter((point) => point.series === name).map((point) => ({ point, ...plotted(point, x, y) }));
    members.sort((a, b) => a.x[0] - b.x[0]);
    series.push({ name, tone: toneOf(members[0].point), line: "straight", isThin: true, points: members });
  }
  for (const point of shown) {
    const isHollow = point.role === "control";
    series.push({
      name: point.name,
      tone: toneOf(point),
      mark: MARK[point.role],
      isHollow,
      isNamed: point.role !== "seed",
      points: [plotted(point, x, y)],
    });
  }
  byId("pg-frontier").figure = {
    label: `${y.label} over ${x.label}`,
    x: axis(x),
    y: axis(y),
    series,
    rules: rules(x, y),
  };
  byId("pg-frontier").selected = chosen;
}

function axis(metric) {
  const better = metric.isHighGood ? "higher is better" : "lower is better";
  const unit = metric.unit.trim();
  const label = unit && unit !== "x" ? `${metric.label} (${unit})` : metric.label;
  return { label: `${label}, ${better}`, ceiling: metric.ceiling ?? undefined };
}

function rules(x, y) {
  const reference = page.points.find((point) => point.role === "reference");
  const seed = page.points.find((point) => point.role === "seed");
  const found = [];
  if (reference !== undefined && y.isAgainstReference) {
    const at = numbers(x, figureOf(reference, x.name))[0];
    if (Number.isFinite(at)) found.push({ x: at, label: reference.name });
  }
  for (const point of [seed, y.isAgainstReference ? undefined : reference]) {
    const at = point === undefined ? NaN : numbers(y, figureOf(point, y.name))[0];
    if (Number.isFinite(at)) found.push({ y: at, label: point.name });
  }
  return found;
}

function legend() {
  const roles = [...new Set(page.points.map((point) => point.role))];
  const tone = { policy: "0", control: "control", reference: "ink", seed: "ink" };
  byId("pg-legend").append(
    ...roles.map((role) =>
      make("span", { class: "fv-key" }, legendMark(MARK[role], tone[role], role === "control"), ROLE[role]),
    ),
    make("span", { class: "fv-key" }, make("i", { class: "pg-solid" }), "best policies"),
    make("span", { class: "fv-key" }, make("i", { class: "pg-dashed" }), "best controls"),
  );
}

// Times ---------------------------------------------------------------------------------------------------------------

function times() {
  const named = page.referenceName;
  const shown = [named, chosen].filter((name, i, all) => page.times[name] !== undefined && all.indexOf(name) === i);
  const scales = shown.length ? page.times[shown[0]] : [];
  byId("pg-bars").figure = {
    label: `Milliseconds per scale of ${shown.join(" and ")}; the table below has the numbers`,
    unit: "",
    groups: scales.map((one) => String(one.scale)),
    titles: scales.map((one) => `scale ${one.scale}, ${one.grid[0]} x ${one.grid[1]}`),
    series: shown.map((name) => ({
      name,
      tone: name === named ? "control" : toneOf(page.points.find((point) => point.name === name)),
      values: scales.map((one) => page.times[name].find((other) => other.scale === one.scale)?.ms ?? NOTHING),
    })),
  };
  byId("pg-bars-legend").replaceChildren(
    ...shown.map((name) => {
      const tone = name === named ? "control" : toneOf(page.points.find((point) => point.name === name));
      const total = page.times[name].reduce((sum, one) => sum + (one.ms[0] ?? 0), 0);
      return make(
        "span",
        { class: `fv-key fv-tone-${tone}` },
        make("i", { class: "fv-chip pg-filled" }),
        make("code", {}, name),
        ` ${total.toFixed(0)} ms in all`,
      );
    }),
  );
}

// Lead ----------------------------------------------------------------------------------------------------------------

function charts() {
  for (const [index, chart] of page.charts.entries()) {
    const plot = byId(`pg-chart-${index}`);
    const series = chart.series.map((one, place) => ({
      name: one.name,
      tone: String(place % TONES),
      mark: one.line === "hv" ? null : "dot",
      line: one.line,
      isNamed: false,
      points: one.points.map((point, i) => ({
        id: `${place}.${i}`,
        label: point.label || one.name,
        x: [point.x],
        y: point.y.slice(0, 3).map((v) => v ?? NaN),
        text: `${chart.x} ${point.x}; ${chart.y} ${printed(point.y)}${point.isFaint ? "; breaks a bound" : ""}`,
        isFaint: point.isFaint,
      })),
    }));
    const rules = chart.limit === null ? [] : [{ y: chart.limit, label: `bound ${chart.limit}` }];
    plot.figure = { label: chart.caption, x: { label: chart.x }, y: { label: chart.y }, series, rules, canPick: false };
    byId(`pg-chart-legend-${index}`).append(
      ...chart.series.map((one, place) =>
        make("span", { class: `fv-key fv-tone-${place % TONES}` }, make("i", { class: "fv-chip pg-filled" }), one.name),
      ),
    );
  }
}

// Copying, theme, choice ----------------------------------------------------------------------------------------------

async function copy(button) {
  const text = byId(button.dataset.copy).textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const selection = getSelection();
    selection.selectAllChildren(byId(button.dataset.copy));
    document.execCommand("copy");
    selection.removeAllRanges();
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
}

let gallery = null;

function choose(name) {
  if (!page.points.some((point) => point.name === name)) return;
  chosen = name;
  byId("pg-policy").value = name;
  tiles();
  if (byId("pg-frontier") !== null) byId("pg-frontier").selected = name;
  gallery?.filter(name);
  if (byId("pg-bars") !== null) times();
  for (const row of document.querySelectorAll("#pg-policies tbody tr"))
    row.classList.toggle("pg-now", row.dataset.name === name);
}

function start() {
  const policy = byId("pg-policy");
  policy.append(...page.points.map((point) => make("option", { value: point.name }, point.name)));
  policy.addEventListener("change", () => choose(policy.value));
  if (byId("pg-frontier") !== null) {
    axisChoices(byId("pg-x"), "cost");
    axisChoices(byId("pg-y"), "fidelity");
    frontier();
    legend();
    byId("pg-frontier").addEventListener("foveate-pick", (event) => choose(event.detail));
  }
  if (byId("pg-gallery") !== null) gallery = new Gallery(page, byId("pg-gallery"), choose);
  charts();
  document.querySelectorAll("table[data-sorts]").forEach(makeSortable);
  for (const button of document.querySelectorAll("#pg-policies [data-choose]")) {
    button.addEventListener("click", () => choose(button.dataset.choose));
  }
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
  byId("pg-theme").addEventListener("click", toggleTheme);
  choose(chosen);
  document.documentElement.dataset.ready = "";
}

start();
