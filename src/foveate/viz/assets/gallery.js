/** The images: one pair large in <foveate-view>, all others as thumbnails, worst first. */
import { make } from "./dom.js";
import { readDepth } from "./maps.js";

/** Sorting keys: the worst value comes first, and what could not be measured before it. */
function worst(metric) {
  return (pair) => {
    const value = pair.figures[metric.name]?.[0];
    if (!Number.isFinite(value)) return -Infinity;
    return metric.isHighGood ? value : -value;
  };
}

export class Gallery {
  #page;
  #parts;
  #policy = "";
  #shown = [];
  #now = null;
  #depths = new Map();

  /** `page` is the page's data, `root` the section with its parts, `onPolicy` is told which policy was chosen. */
  constructor(page, root, onPolicy) {
    this.#page = page;
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    this.#parts = {
      view: root.querySelector("foveate-view"),
      list: part("thumbs"),
      filter: part("filter"),
      sort: part("sort"),
      count: part("count"),
      details: part("details"),
    };
    const { filter, sort } = this.#parts;
    const names = page.points.map((point) => point.name).filter((name) => page.pairs.some((p) => p.policy === name));
    filter.append(
      make("option", { value: "" }, "all policies"),
      ...names.map((name) => make("option", { value: name }, name)),
    );
    sort.append(...page.pairMetrics.map((metric, i) => make("option", { value: i }, `worst ${metric.label} first`)));
    sort.append(make("option", { value: "prompt" }, "prompt, A to Z"));
    filter.addEventListener("change", () => (filter.value ? onPolicy(filter.value) : this.filter("")));
    sort.addEventListener("change", () => this.#list());
    this.#parts.list.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Shows the pairs of a policy, or of all; a policy without images changes nothing. */
  filter(policy) {
    if (policy && !this.#page.pairs.some((pair) => pair.policy === policy)) return;
    this.#policy = policy;
    this.#parts.filter.value = policy;
    this.#list();
  }

  #list() {
    const { sort, list, count } = this.#parts;
    const { pairs, pairMetrics } = this.#page;
    const key = sort.value === "prompt" ? null : worst(pairMetrics[Number(sort.value)]);
    this.#shown = pairs.filter((pair) => !this.#policy || pair.policy === this.#policy);
    this.#shown.sort((a, b) => (key ? key(a) - key(b) || 0 : a.prompt.localeCompare(b.prompt)));
    list.replaceChildren(...this.#shown.map((pair) => this.#thumbnail(pair)));
    count.textContent = this.#shown.length === 1 ? "1 pair" : `${this.#shown.length} pairs`;
    if (this.#shown.length) this.#show(this.#shown[0]);
  }

  #thumbnail(pair) {
    const metric = this.#page.pairMetrics[Number(this.#parts.sort.value)] ?? this.#page.pairMetrics[0];
    const printed = metric === undefined ? "" : (pair.figures[metric.name]?.[1] ?? "n/a");
    const text = pair.isIdentical ? "identical" : printed;
    const said = `${pair.prompt}, seed ${pair.seed}, ${pair.policy}: ${metric?.label ?? ""} ${text}`;
    return make(
      "button",
      { type: "button", class: "pg-thumb", tabindex: "-1", "aria-label": said, onclick: () => this.#show(pair) },
      make("img", { src: this.#page.images[pair.picture], alt: "", loading: "lazy", decoding: "async" }),
      make("span", {}, text),
    );
  }

  #key(event) {
    const buttons = [...this.#parts.list.children];
    const at = buttons.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = { Home: 0, End: buttons.length - 1 }[event.key] ?? (step === undefined ? undefined : at + step);
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    const target = buttons[Math.min(Math.max(next, 0), buttons.length - 1)];
    target.focus();
    target.click();
  }

  #show(pair) {
    this.#now = pair;
    const { images, referenceName } = this.#page;
    this.#parts.view.show({
      reference: images[pair.reference],
      picture: images[pair.picture],
      referenceName,
      pictureName: pair.policy,
      flip: pair.flip === null ? null : images[pair.flip],
      scales: this.#scales(pair),
    });
    [...this.#parts.list.children].forEach((button, index) => {
      const isNow = this.#shown[index] === pair;
      button.setAttribute("aria-pressed", String(isNow));
      button.setAttribute("tabindex", isNow || (index === 0 && !this.#shown.includes(pair)) ? "0" : "-1");
    });
    this.#details(pair);
  }

  /** Depths are unpacked once per pair, when it is first looked at. */
  #scales(pair) {
    if (!this.#depths.has(pair)) {
      this.#depths.set(
        pair,
        pair.scales.map(({ scale, grid, blocks, depth, caption }) => ({
          scale,
          rows: grid[0],
          columns: grid[1],
          blocks,
          caption,
          depth: readDepth(depth, grid[0] * grid[1]),
        })),
      );
    }
    return this.#depths.get(pair);
  }

  #details(pair) {
    const { pairMetrics, pairs } = this.#page;
    const figures = pairMetrics.filter((metric) => metric.name in pair.figures);
    const said = [
      ["seed", String(pair.seed)],
      ...figures.map((metric) => [metric.label, pair.figures[metric.name][1]]),
    ];
    if (pair.isIdentical) said.push(["bytes", "identical"]);
    const others = pairs.filter((other) => other.prompt === pair.prompt && other.seed === pair.seed);
    this.#parts.details.replaceChildren(
      make("h3", {}, pair.prompt),
      make(
        "dl",
        { class: "pg-figures" },
        ...said.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text))),
      ),
      make("h4", {}, "The same prompt and seed by"),
      make(
        "div",
        { class: "pg-others", role: "group", "aria-label": "Policies of this prompt" },
        ...others.map((other) => this.#other(other, pair)),
      ),
    );
  }

  #other(other, pair) {
    const metric = this.#page.pairMetrics[0];
    const choose = () => {
      this.#show(other);
      this.#parts.details.querySelector('[aria-pressed="true"]')?.focus();
    };
    return make(
      "button",
      { type: "button", class: "pg-other", "aria-pressed": String(other === pair), onclick: choose },
      make("code", {}, other.policy),
      make("span", {}, other.isIdentical ? "identical" : (other.figures[metric?.name]?.[1] ?? "")),
    );
  }
}
