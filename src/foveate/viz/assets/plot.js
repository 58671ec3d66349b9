/**
 * <foveate-plot>: points with intervals on two axes, as SVG. Every point can be reached with Tab and the arrow keys,
 * says its values, and is chosen with Enter, Space or a click.
 *
 *   plot.figure = {
 *     label: "Frontier",                                     // what a screen reader says
 *     x: { label: "speedup" }, y: { label: "PSNR (dB)", ceiling: 50 },
 *     series: [{ name, tone: "0", mark: "circle", line: null | "straight" | "hv" | "vh", isDashed, isThin,
 *                points: [{ id, label, text, x: [value, low, high], y: [value, low, high], isFaint }] }],
 *     // low and high are optional
 *     aspect: 0.56,                                          // optional, height over width, within limits
 *     canPick: true,                                         // false: points say their values, and that is all
 *     rules: [{ x | y: 1, label }],                          // dashed lines across the plot
 *   };
 *   plot.selected = id;
 *
 * Events: "foveate-pick" (detail: the point's id).
 */
import { draw, make } from "./dom.js";

const MARGIN = { top: 16, right: 20, bottom: 46, left: 56 };
const MARKS = {
  circle: "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0",
  diamond: "M0-7.5L7.5 0L0 7.5L-7.5 0Z",
  star: "M0-9L2.4-3.1L8.6-2.8L3.8 1.2L5.3 7.3L0 3.9L-5.3 7.3L-3.8 1.2L-8.6-2.8L-2.4-3.1Z",
  cross: "M-5-5L5 5M-5 5L5-5",
  dot: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
};
const LABEL_WIDTH = 7.3;
const LABEL_LETTERS = 30;

/** A mark alone, for a legend. */
export function legendMark(mark, tone, isHollow = false) {
  const kind = `fv-mark fv-tone-${tone}${isHollow ? " fv-hollow" : ""}`;
  return draw(
    "svg",
    { viewBox: "-10 -10 20 20", width: 16, height: 16, "aria-hidden": "true" },
    draw("path", { d: MARKS[mark], class: kind }),
  );
}

/** Round numbers that span a range. */
export function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw - 1e-12);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (Math.abs(step / power - 2.5) < 1e-9 ? 1 : 0));
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = first; i * step <= high + 1e-9 * step; i += 1)
    found.push({ value: i * step, text: (i * step).toFixed(digits) });
  return found;
}

/** Lowest and highest of a list, with room around; `only` values decide if there are any. */
function domain(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = high > low ? 0.07 * (high - low) : Math.max(0.5, Math.abs(high) * 0.1);
  return [low - room, high + room];
}

export class FoveatePlot extends HTMLElement {
  #figure = null;
  #selected = null;
  #width = 0;
  #marks = [];
  #tip = null;
  #observer = null;

  connectedCallback() {
    this.#observer = new ResizeObserver(() => {
      if (Math.abs(this.clientWidth - this.#width) > 1) this.#draw();
    });
    this.#observer.observe(this);
    this.#draw();
  }

  disconnectedCallback() {
    this.#observer.disconnect();
  }

  set figure(figure) {
    this.#figure = figure;
    this.#draw();
  }

  set selected(id) {
    this.#selected = id;
    this.#draw();
  }

  #draw() {
    this.#width = this.clientWidth;
    if (this.#figure === null || !this.isConnected || this.#width < 60) return;
    const hadFocus = this.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
    const height = Math.round(Math.min(Math.max((this.#figure.aspect ?? 0.56) * this.#width, 300), 500));
    const space = this.#space(height);
    const svg = draw("svg", {
      viewBox: `0 0 ${this.#width} ${height}`,
      width: this.#width,
      height,
      role: "group",
      "aria-label": this.#figure.label,
    });
    this.#axes(svg, space);
    this.#rules(svg, space);
    const placed = this.#figure.series.map((one) => this.#series(svg, space, one)).flat();
    this.#labels(svg, space, placed);
    this.#points(svg, placed);
    this.#tip = make("div", { class: "fv-tip", "aria-hidden": "true", hidden: true });
    this.replaceChildren(svg, this.#tip);
    if (hadFocus !== undefined) this.#marks.find((mark) => mark.dataset.id === hadFocus)?.focus();
  }

  #space(height) {
    const { series, rules = [], y: yAxis } = this.#figure;
    const points = series.flatMap((one) => one.points);
    const limit = yAxis.ceiling ?? Infinity;
    const xs = [...points.flatMap((p) => p.x), ...rules.map((r) => r.x)].filter(Number.isFinite);
    const all = [...points.flatMap((p) => p.y), ...rules.map((r) => r.y)].filter(Number.isFinite);
    const below = all.filter((v) => v < limit);
    const ys = below.length ? below : all;
    const [x0, x1] = domain(xs.length ? xs : [0, 1]);
    const [y0, y1] = domain(ys.length ? ys : [0, 1]);
    const right = this.#width - MARGIN.right;
    const bottom = height - MARGIN.bottom;
    return {
      height,
      right,
      bottom,
      x0,
      x1,
      y0,
      y1,
      x: (v) => MARGIN.left + ((v - x0) / (x1 - x0)) * (right - MARGIN.left),
      y: (v) => (v >= limit && below.length ? MARGIN.top : bottom - ((v - y0) / (y1 - y0)) * (bottom - MARGIN.top)),
    };
  }

  #axes(svg, space) {
    const { x, y } = this.#figure;
    const grid = draw("g", { class: "fv-axis", "aria-hidden": "true" });
    for (const tick of ticks(space.x0, space.x1, this.#width / 90)) {
      const at = space.x(tick.value);
      grid.append(draw("line", { x1: at, x2: at, y1: MARGIN.top, y2: space.bottom }));
      grid.append(draw("text", { x: at, y: space.bottom + 18, "text-anchor": "middle" }, tick.text));
    }
    for (const tick of ticks(space.y0, space.y1, space.height / 60)) {
      const at = space.y(tick.value);
      grid.append(draw("line", { x1: MARGIN.left, x2: space.right, y1: at, y2: at }));
      grid.append(draw("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, tick.text));
    }
    const middle = (MARGIN.top + space.bottom) / 2;
    grid.append(
      draw(
        "text",
        {
          class: "fv-axis-name",
          x: (MARGIN.left + space.right) / 2,
          y: space.height - 6,
          "text-anchor": "middle",
        },
        x.label,
      ),
    );
    grid.append(
      draw(
        "text",
        {
          class: "fv-axis-name",
          transform: `translate(14 ${middle}) rotate(-90)`,
          "text-anchor": "middle",
        },
        y.label,
      ),
    );
    svg.append(grid);
  }

  #rules(svg, space) {
    for (const rule of this.#figure.rules ?? []) {
      const isUpright = rule.x !== undefined;
      const at = isUpright ? space.x(rule.x) : space.y(rule.y);
      const ends = isUpright
        ? { x1: at, x2: at, y1: MARGIN.top, y2: space.bottom }
        : { x1: MARGIN.left, x2: space.right, y1: at, y2: at };
      const place = isUpright
        ? { x: at + 5, y: MARGIN.top + 11, "text-anchor": "start" }
        : this.#besideRule(rule, at, space);
      svg.append(
        draw("line", { class: "fv-rule", ...ends }),
        draw("text", { class: "fv-rule-name", ...place }, rule.label),
      );
    }
  }

  /** A level line's name stands at its right end, or at its left one where points are in the way. */
  #besideRule(rule, at, space) {
    const width = rule.label.length * LABEL_WIDTH;
    const points = this.#figure.series.flatMap((one) => (one.mark ? one.points : []));
    const isMet = points.some((p) => Math.abs(space.y(p.y[0]) - at) < 16 && space.x(p.x[0]) > space.right - width - 14);
    return isMet
      ? { x: MARGIN.left + 4, y: at - 5, "text-anchor": "start" }
      : { x: space.right - 4, y: at - 5, "text-anchor": "end" };
  }

  #series(svg, space, one) {
    const points = one.points.filter((p) => Number.isFinite(p.x[0]) && Number.isFinite(p.y[0]));
    const placed = points.map((point) => ({ ...point, one, at: [space.x(point.x[0]), space.y(point.y[0])] }));
    if (one.line && placed.length > 1) {
      const kind = `fv-line fv-tone-${one.tone}${one.isDashed ? " fv-dashed" : ""}${one.isThin ? " fv-thin" : ""}`;
      svg.append(
        draw("path", {
          class: kind,
          d: lineThrough(
            placed.map((p) => p.at),
            one.line,
          ),
        }),
      );
    }
    for (const point of one.mark ? placed : []) svg.append(...whiskers(point, space));
    return one.mark ? placed : [];
  }

  #points(svg, placed) {
    const ordered = [...placed].sort((a, b) => a.at[0] - b.at[0]);
    const first = Math.max(
      0,
      ordered.findIndex((p) => p.id === this.#selected),
    );
    this.#marks = ordered.map((point, index) => this.#mark(point, index === first));
    const isLast = (mark) => mark.classList.contains("fv-selected");
    svg.append(...this.#marks.filter((mark) => !isLast(mark)), ...this.#marks.filter(isLast));
  }

  #mark(point, isStop) {
    const isSelected = point.id === this.#selected;
    const kind = ["fv-point", `fv-tone-${point.one.tone}`, point.isFaint && "fv-faint", isSelected && "fv-selected"];
    const canPick = this.#figure.canPick ?? true;
    const mark = draw("g", {
      class: kind.filter(Boolean).join(" "),
      transform: `translate(${point.at[0]} ${point.at[1]})`,
      role: canPick ? "button" : "img",
      tabindex: isStop ? 0 : -1,
      "data-id": point.id,
      "aria-pressed": canPick && String(isSelected),
      "aria-label": `${point.label}: ${point.text}`,
    });
    if (isSelected) mark.append(draw("circle", { class: "fv-halo", r: 12 }));
    mark.append(draw("circle", { class: "fv-target", r: 14 }));
    mark.append(draw("path", { class: `fv-mark${point.one.isHollow ? " fv-hollow" : ""}`, d: MARKS[point.one.mark] }));
    const pick = () =>
      canPick && this.dispatchEvent(new CustomEvent("foveate-pick", { detail: point.id, bubbles: true }));
    mark.addEventListener("click", pick);
    mark.addEventListener("keydown", (event) => this.#key(event, mark, pick));
    for (const kindOf of ["mouseenter", "focus"]) mark.addEventListener(kindOf, () => this.#show(point));
    for (const kindOf of ["mouseleave", "blur"]) mark.addEventListener(kindOf, () => (this.#tip.hidden = true));
    return mark;
  }

  #key(event, mark, pick) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") pick();
    else if (event.key === "Escape") this.#tip.hidden = true;
    else if (step === undefined) return;
    else {
      const next = this.#marks[(this.#marks.indexOf(mark) + step + this.#marks.length) % this.#marks.length];
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    }
    event.preventDefault();
  }

  #show(point) {
    this.#tip.replaceChildren(
      make("b", {}, point.label),
      ...point.text.split("; ").map((line) => make("span", {}, line)),
    );
    this.#tip.hidden = false;
    const [x, y] = point.at;
    const left = Math.min(Math.max(4, x - this.#tip.offsetWidth / 2), this.#width - this.#tip.offsetWidth - 4);
    const above = y - this.#tip.offsetHeight - 16;
    this.#tip.style.setProperty("left", `${left}px`);
    this.#tip.style.setProperty("top", `${above > 0 ? above : y + 18}px`);
  }

  /** Names of points where they hit neither a point nor another name; the chosen one comes first. */
  #labels(svg, space, placed) {
    const taken = placed.map(({ at, id }) => {
      const room = id === this.#selected ? 11 : 8;
      return [at[0] - room, at[1] - room, at[0] + room, at[1] + room];
    });
    const order = [...placed].filter((p) => !p.isFaint && p.one.isNamed !== false);
    order.sort((a, b) => (b.id === this.#selected) - (a.id === this.#selected) || rank(a) - rank(b));
    for (const point of order) {
      const text =
        point.label.length > LABEL_LETTERS ? `${point.label.slice(0, LABEL_LETTERS - 1)}\u2026` : point.label;
      const box = this.#free(point.at, text.length * LABEL_WIDTH, space, taken);
      if (box === null) continue;
      taken.push(box);
      const kind = `fv-name fv-tone-${point.one.tone}${point.id === this.#selected ? " fv-selected" : ""}`;
      svg.append(draw("text", { class: kind, x: box[0], y: box[3] - 4, "aria-hidden": "true" }, text));
    }
  }

  #free([x, y], width, space, taken) {
    const places = [
      [x + 13, y - 8],
      [x - 13 - width, y - 8],
      [x - width / 2, y - 27],
      [x - width / 2, y + 11],
      [x + 9, y - 22],
      [x + 9, y + 6],
      [x - 9 - width, y - 22],
      [x - 9 - width, y + 6],
    ];
    const boxes = places.map(([left, top]) => [left, top, left + width, top + 16]);
    const isInside = (b) => b[0] > MARGIN.left && b[2] < this.#width && b[1] > 0 && b[3] < space.bottom;
    const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    return boxes.find((box) => isInside(box) && !taken.some((other) => meets(box, other))) ?? null;
  }
}

/** Policies are named before controls. */
function rank(point) {
  return point.one.isHollow ? 1 : 0;
}

function lineThrough(places, kind) {
  const steps = places
    .slice(1)
    .map(([x, y]) => (kind === "hv" ? `H${x}V${y}` : kind === "vh" ? `V${y}H${x}` : `L${x} ${y}`));
  return `M${places[0][0]} ${places[0][1]}${steps.join("")}`;
}

function hasInterval(figure) {
  return Number.isFinite(figure[1]) && Number.isFinite(figure[2]);
}

function whiskers(point, space) {
  const [x, y] = point.at;
  const found = [];
  const kind = { class: `fv-whisker fv-tone-${point.one.tone}` };
  if (hasInterval(point.y)) {
    const [low, high] = [space.y(point.y[1]), space.y(point.y[2])];
    found.push(draw("path", { ...kind, d: `M${x} ${low}V${high}M${x - 3} ${low}h6M${x - 3} ${high}h6` }));
  }
  if (hasInterval(point.x)) {
    const [low, high] = [space.x(point.x[1]), space.x(point.x[2])];
    found.push(draw("path", { ...kind, d: `M${low} ${y}H${high}M${low} ${y - 3}v6M${high} ${y - 3}v6` }));
  }
  return found;
}

customElements.define("foveate-plot", FoveatePlot);
