/**
 * <foveate-ladder>: all scales in a row, from one token to the last grid, and below them the FLOPs of the full run as one
 * bar that fills with what ran. It is progress, plot and choice at once.
 *
 *   ladder.grids = [[1, 1], [2, 2], ...];    // before a run: what will come
 *   ladder.scales = run.scales;              // those of run.js; fewer than grids while the image forms
 *   ladder.selected = 3;
 *
 * Events: "foveate-rung" (detail: the index).
 */
import { draw, make } from "./viz/dom.js";
import { paintCompute } from "./viz/maps.js";
import { printMs } from "./run.js";
import { urlOf } from "./urls.js";

/** Of the row: even one token keeps a share of the width that can be seen. */
const SMALLEST = 0.3;
const PIXELS = 208;

export class FoveateLadder extends HTMLElement {
  #grids = [];
  #scales = [];
  #selected = -1;
  #rungs = [];
  #row = make("div", { class: "sv-rungs", role: "group", "aria-label": "Scales, coarse to fine" });
  #bar = make("div", { class: "sv-work" });

  connectedCallback() {
    this.replaceChildren(this.#row, this.#bar);
    this.#row.addEventListener("keydown", (event) => this.#key(event));
    this.#build();
  }

  set grids(grids) {
    if (JSON.stringify(grids) === JSON.stringify(this.#grids)) return;
    this.#grids = grids;
    this.#build();
  }

  /** All scales that are there; only new ones are painted. */
  set scales(scales) {
    const grids = scales.map((scale) => [scale.rows, scale.columns]);
    const isForeign = grids.some((grid, i) => String(grid) !== String(this.#grids[i]));
    const isContinued = this.#scales.length && this.#scales.every((scale, index) => scales[index] === scale);
    const from = isContinued && !isForeign ? this.#scales.length : 0;
    this.#scales = [...scales];
    if (isForeign) this.#grids = grids;
    if (from === 0) this.#build();
    scales.slice(from).forEach((scale, index) => this.#fill(from + index, scale));
    this.#work();
    if (from > 0) this.#row.scrollLeft = this.#rungs[scales.length - 1].rung.offsetLeft;
  }

  set selected(index) {
    this.#selected = index;
    this.#mark();
  }

  #build() {
    const most = Math.max(...this.#grids.map(([rows, columns]) => Math.max(rows, columns)), 1);
    const sides = this.#grids.map((grid) => SMALLEST + (1 - SMALLEST) * (Math.max(...grid) / most));
    const all = sides.reduce((a, b) => a + b, 0);
    this.#rungs = this.#grids.map(([rows, columns], index) => {
      const side = sides[index] / all;
      const canvas = make("canvas", { width: 1, height: 1, "aria-hidden": "true" });
      const shown = make("span", { class: "sv-pane" }, mesh(rows, columns), canvas);
      shown.style.setProperty("--side", side.toFixed(4));
      shown.style.setProperty("--aspect", `${columns} / ${rows}`);
      const name = make("span", { class: "sv-grid" }, `${rows}\u2009\u00d7\u2009${columns}`);
      const told = make("span", { class: "sv-told" }, "\u00a0");
      const more = make("i", { class: "sv-hidden" });
      const rung = make(
        "button",
        { type: "button", class: "sv-rung", disabled: true, tabindex: "-1", onclick: () => this.#pick(index) },
        shown,
        make("i", { class: "sv-hidden" }, `Scale ${index}, `),
        name,
        more,
        told,
      );
      return { rung, canvas, told, more };
    });
    this.#row.replaceChildren(...this.#rungs.map(({ rung }) => rung));
    this.#mark();
  }

  #pick(index) {
    this.selected = index;
    this.dispatchEvent(new CustomEvent("foveate-rung", { detail: index, bubbles: true }));
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const last = this.#scales.length - 1;
    const next = { Home: 0, End: last }[event.key] ?? (step === undefined ? undefined : this.#selected + step);
    if (next === undefined) return;
    event.preventDefault();
    this.#pick(Math.min(Math.max(next, 0), last));
    this.#rungs[this.#selected]?.rung.focus();
  }

  #mark() {
    const stop = this.#selected >= 0 ? this.#selected : 0;
    this.#rungs.forEach(({ rung }, index) => {
      const isNow = index === this.#selected && index < this.#scales.length;
      rung.setAttribute("aria-pressed", String(isNow));
      rung.setAttribute("tabindex", index === stop ? "0" : "-1");
    });
    // A row that scrolls must be reached with the keyboard, also while it has nothing to choose.
    if (this.#scales.length) this.#row.removeAttribute("tabindex");
    else this.#row.setAttribute("tabindex", "0");
    [...this.#bar.querySelectorAll(".sv-part")].forEach((part, i) =>
      part.classList.toggle("sv-now", i === this.#selected),
    );
  }

  async #fill(index, scale) {
    const { rung, canvas, told, more } = this.#rungs[index];
    rung.disabled = false;
    more.textContent =
      scale.depth === null ? ", did not run, " : `, ${scale.tokens.run} of ${scale.tokens.full} tokens, `;
    told.textContent = printMs(scale.ms);
    rung.classList.toggle("sv-left-out", scale.depth === null);
    if (scale.image === undefined) return;
    const image = new Image();
    image.src = urlOf(scale.image);
    await image.decode().catch(() => {});
    if (this.#scales[index] !== scale || !image.naturalWidth) return;
    canvas.width = PIXELS;
    canvas.height = Math.round((PIXELS * image.naturalHeight) / image.naturalWidth);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    const target = new ImageData(canvas.width, canvas.height);
    paintCompute(target, pixels, scale);
    context.putImageData(target, 0, 0);
    rung.classList.add("sv-filled");
  }

  /** One part for each scale, as wide as its FLOPs in the full run; what ran is filled. */
  #work() {
    const full = this.#scales.reduce((sum, scale) => sum + scale.flops.full, 0);
    const isDone = this.#scales.length >= this.#grids.length;
    const parts = this.#scales.map((scale) => {
      const ran = make("span", { class: "sv-ran" });
      ran.style.setProperty("--ran", `${(100 * scale.flops.run) / scale.flops.full}%`);
      const part = make("span", { class: "sv-part" }, ran);
      part.style.setProperty("--flops", scale.flops.full / full);
      return part;
    });
    if (!isDone) {
      const rest = make("span", { class: "sv-rest" });
      rest.style.setProperty("--flops", this.#restShare());
      parts.push(rest);
    }
    this.#bar.replaceChildren(...parts);
    this.#mark();
  }

  /** How much is still to come, in units of what came, by tokens: the FLOPs of a scale are known when it is there. */
  #restShare() {
    const tokens = this.#grids.map(([rows, columns]) => rows * columns);
    const came = tokens.slice(0, this.#scales.length).reduce((a, b) => a + b, 0);
    const rest = tokens.slice(this.#scales.length).reduce((a, b) => a + b, 0);
    return came ? rest / came : 1;
  }
}

/** The tokens of a scale as lines, until its image is there. */
function mesh(rows, columns) {
  const lines = [];
  for (let x = 1; x < columns; x += 1) lines.push(`M${x} 0V${rows}`);
  for (let y = 1; y < rows; y += 1) lines.push(`M0 ${y}H${columns}`);
  return draw(
    "svg",
    { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", class: "sv-mesh", "aria-hidden": "true" },
    draw("path", { d: lines.join("") }),
  );
}

customElements.define("foveate-ladder", FoveateLadder);
