/** The image in the middle: it forms, is compared, and stands among its seeds; the ladder below follows. */
import { make } from "./viz/dom.js";
import { printMs, transformerMs } from "./run.js";
import { urlOf } from "./urls.js";

const byId = (id) => document.getElementById(id);

export class Stage {
  #runs = [];
  #shown = null;
  #wanted = "slider";
  #isLookingCloser = false;
  #view = byId("view");
  #ladder = byId("ladder");
  #onShow;

  /** `onShow` is called with the run that the reader chose among the seeds. */
  constructor({ onShow }) {
    this.#onShow = onShow;
    this.#view.addEventListener("foveate-view", (event) => {
      this.#wanted = event.detail;
      this.#isLookingCloser = false;
    });
    this.#view.addEventListener("foveate-scale", (event) => (this.#ladder.selected = event.detail));
    this.#ladder.addEventListener("foveate-rung", (event) => {
      this.#view.view = "compute";
      this.#view.scale = event.detail;
      this.#view.scrollIntoView({ block: "nearest" });
      this.#isLookingCloser = this.#shown?.done !== null;
    });
  }

  get shown() {
    return this.#shown;
  }

  /** What the status line says; what passes at once is not read out. */
  say(text, isPassing = false) {
    byId("status").setAttribute("aria-busy", String(isPassing));
    byId("status").textContent = text;
  }

  /** Runs that begin; the first of them is watched. */
  begin(runs) {
    if (byId("stage").getBoundingClientRect().top > 0.6 * innerHeight) byId("stage").scrollIntoView({ block: "start" });
    this.#runs = runs;
    this.#shown = runs[0];
    this.#isLookingCloser = false;
    byId("empty").hidden = true;
    this.#view.hidden = false;
    this.#view.show({ subject: runs[0].prompt });
    this.#ladder.scales = [];
    this.#tiles();
    this.#which();
  }

  /** A scale of one of the runs. */
  scale(run, scale) {
    if (run === this.#shown) {
      this.#view.addScale(drawn(scale));
      this.#ladder.scales = run.scales;
      this.#ladder.selected = run.scales.length - 1;
    }
    const tile = this.#tileOf(run);
    if (tile && scale.image) tile.querySelector("img").src = urlOf(scale.image);
    if (tile) tile.querySelector("span").textContent = `${scale.rows} \u00d7 ${scale.columns}`;
  }

  /** A finished run beside its full run, if there is one; a run of another request brings its own tiles. */
  show(run, reference) {
    const scale = this.#isLookingCloser && run === this.#shown ? this.#view.scale : run.scales.length - 1;
    this.#isLookingCloser &&= run === this.#shown;
    if (!this.#runs.includes(run)) this.#runs = [run];
    this.#shown = run;
    const other = run.isFull ? null : reference;
    byId("empty").hidden = true;
    this.#view.hidden = false;
    this.#view.show({
      subject: run.prompt,
      reference: other && urlOf(other.picture),
      picture: urlOf(run.picture),
      referenceName: other ? "full run" : "",
      pictureName: other ? run.title : "",
      scales: run.scales.map(drawn),
    });
    this.#view.view = this.#bestView(other !== null);
    this.#ladder.scales = run.scales;
    this.#view.scale = scale;
    this.#ladder.selected = scale;
    this.#tiles();
    this.#which();
  }

  /** Back to the beginning. */
  clear() {
    this.#runs = [];
    this.#shown = null;
    byId("empty").hidden = false;
    this.#view.hidden = true;
    this.#ladder.scales = [];
    this.#tiles();
    this.#which();
    this.say("");
  }

  /** What of the scales is said beside the ladder. */
  about() {
    const run = this.#shown;
    if (run === null || !run.scales.length) return "";
    const sum = (name) => run.scales.reduce((total, scale) => total + scale.flops[name], 0);
    const left = Math.round(100 * (1 - sum("run") / sum("full")));
    return left > 0
      ? `The bar is the full run\u2019s work. Filled parts ran; ${left} % was left out.`
      : "The bar is the full run\u2019s work. All of it ran.";
  }

  /** What the reader chose last, where it can be had. */
  #bestView(hasReference) {
    if (this.#wanted === "compute" || this.#isLookingCloser) return "compute";
    if (!hasReference) return "image";
    return this.#wanted === "image" ? "slider" : this.#wanted;
  }

  #which() {
    const run = this.#shown;
    const parts = run === null ? [] : [`seed ${run.seed}`, run.title, run.isFull ? "" : run.policy?.spec];
    byId("which").textContent = parts.filter((part, i) => part && parts.indexOf(part) === i).join(" \u00b7 ");
    byId("scales-text").textContent = this.about();
  }

  #tiles() {
    const tiles = byId("tiles");
    tiles.hidden = this.#runs.length < 2;
    tiles.replaceChildren(...(tiles.hidden ? [] : this.#runs.map((run) => this.#tile(run))));
    tiles.dataset.count = this.#runs.length;
  }

  #tile(run) {
    const latest = run.picture ?? run.scales.at(-1)?.image;
    const image = make("img", { alt: "", ...(latest ? { src: urlOf(latest) } : {}) });
    const choose = () => run.picture !== null && this.#onShow(run);
    const said = run.picture === null ? "waits" : printMs(transformerMs(run));
    return make(
      "button",
      {
        type: "button",
        class: "sv-tile",
        "data-run": run.id,
        "aria-pressed": String(run === this.#shown),
        onclick: choose,
      },
      image,
      make("i", { class: "sv-hidden" }, "Seed"),
      make("b", {}, String(run.seed)),
      make("span", {}, said),
    );
  }

  #tileOf(run) {
    return byId("tiles").querySelector(`[data-run="${run.id}"]`);
  }
}

/** A scale as <foveate-view> wants it: with the address of its image. */
function drawn(scale) {
  return { ...scale, image: scale.image === undefined ? undefined : urlOf(scale.image) };
}
