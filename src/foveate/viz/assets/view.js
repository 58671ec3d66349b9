/**
 * <foveate-view>: two images of one prompt and seed, looked at in five ways: slider, side by side, difference, FLIP
 * map, and the compute map of every scale; an image without another one is shown alone. The report and the server's
 * page share it. It sends no request and writes no inline style or handler, so it works under a content security policy
 * without 'unsafe-inline'.
 *
 *   const view = document.createElement("foveate-view");        // with theme.css and view.css
 *   view.show({
 *     subject: "a red apple",                                   // optional, for a screen reader
 *     reference: "data:...", picture: "data:...",               // URLs; reference may be null: then only one image
 *     referenceName: "full", pictureName: "fovea",
 *     flip: "data:..." | null,                                  // grey, 255 is 1
 *     scales: [{ scale, rows, columns, blocks, depth, caption, image }],
 *   });
 *   view.view = "compute";                                      // image, slider, side, difference, flip, compute
 *
 * `depth` has the blocks that each token ran, -1 where it did not run, or is null where the whole scale did not;
 * `caption` is the line below; `image` is an optional URL of the image as of that scale.
 *
 * Live use: `addScale({...})` appends a scale and shows it, coarse to fine; `show` with the finished images ends that.
 * Events: "foveate-view" (detail: the view) when the reader changes the view, "foveate-scale" (detail: its index) when
 * another scale is chosen.
 */
import { make } from "./dom.js";
import { paintCompute, paintDifference, paintHeat, paintTokens } from "./maps.js";

const VIEWS = {
  image: "Image",
  slider: "Slider",
  side: "Side by side",
  difference: "Difference",
  flip: "FLIP",
  compute: "Compute",
};
const SMALLEST_CANVAS = 512;
const MS_PER_SCALE = 450;
const EMPTY = {
  subject: "",
  reference: null,
  picture: null,
  referenceName: "",
  pictureName: "",
  flip: null,
  scales: [],
};
let made = 0;

export class FoveateView extends HTMLElement {
  #pair = EMPTY;
  #view = "slider";
  #scale = 0;
  #turn = 0;
  #timer = null;
  #parts = null;

  connectedCallback() {
    if (this.#parts === null) this.#build();
    this.#refresh();
  }

  disconnectedCallback() {
    this.#stop();
  }

  /** Shows a pair; the view stays where the pair has it, the scale starts at the last one that ran something. */
  show(pair) {
    this.#stop();
    this.#pair = { ...EMPTY, ...pair };
    this.#scale = Math.max(0, this.#pair.scales.length - 1);
    this.#refresh();
  }

  /** Whether the compute view lays the map over the image. */
  get hasMap() {
    return this.#parts === null || this.#parts.over.checked;
  }

  set hasMap(isOn) {
    if (this.#parts === null) this.#build();
    this.#parts.over.checked = isOn;
    this.#paint();
  }

  /** Appends a scale while an image is forming, and shows it. */
  addScale(scale) {
    this.#pair = { ...this.#pair, scales: [...this.#pair.scales, scale] };
    this.#scale = this.#pair.scales.length - 1;
    this.#view = "compute";
    this.#refresh();
  }

  get view() {
    return this.#view;
  }

  set view(view) {
    if (!(view in VIEWS)) throw new RangeError(`view must be one of ${Object.keys(VIEWS).join(", ")}, got ${view}`);
    this.#view = view;
    this.#stop();
    this.#refresh();
  }

  get scale() {
    return this.#scale;
  }

  set scale(index) {
    this.#scale = Math.min(Math.max(0, Math.round(index)), Math.max(0, this.#pair.scales.length - 1));
    this.#refresh();
    this.dispatchEvent(new CustomEvent("foveate-scale", { detail: this.#scale, bubbles: true }));
  }

  #has(view) {
    const { reference, picture, flip, scales } = this.#pair;
    if (view === "compute") return scales.length > 0;
    if (view === "flip") return flip !== null;
    if (view === "image") return reference === null && picture !== null;
    return reference !== null && picture !== null;
  }

  #build() {
    made += 1;
    const tab = ([view, text]) => {
      const input = make("input", { type: "radio", name: `fv-view-${made}`, value: view });
      input.addEventListener("change", () => {
        this.view = view;
        this.dispatchEvent(new CustomEvent("foveate-view", { detail: view, bubbles: true }));
      });
      return make("label", { class: "fv-tab" }, input, make("span", {}, text));
    };
    const image = (name) => make("img", { class: `fv-${name}`, alt: "", draggable: "false" });
    const range = (name, label, limits) =>
      make("input", { type: "range", class: name, "aria-label": label, ...limits });
    this.#parts = {
      tabs: make(
        "div",
        { class: "fv-tabs", role: "radiogroup", "aria-label": "View" },
        ...Object.entries(VIEWS).map(tab),
      ),
      reference: image("reference"),
      picture: image("picture"),
      canvas: make("canvas", { class: "fv-canvas", role: "img" }),
      handle: range("fv-handle", "Boundary between the two images", { min: 0, max: 100, step: 1, value: 50 }),
      left: make("span", { class: "fv-tag fv-left" }),
      right: make("span", { class: "fv-tag fv-right" }),
      none: make("span", { class: "fv-none" }, "this scale did not run"),
      gain: range("fv-gain", "Amplification of the difference", { min: 0, max: 5, step: 1, value: 2 }),
      gainText: make("output", { class: "fv-gain-text" }),
      scrub: range("fv-scrub", "Scale", { min: 0, max: 0, step: 1, value: 0 }),
      play: make("button", { type: "button", class: "fv-play" }, "Play"),
      over: make("input", { type: "checkbox", class: "fv-over", checked: true }),
      strip: make("div", { class: "fv-strip" }),
      caption: make("p", { class: "fv-caption", "aria-live": "polite" }),
      legend: make("p", { class: "fv-legend" }),
    };
    this.#listen();
    this.#assemble();
  }

  #listen() {
    const { handle, gain, scrub, play, over } = this.#parts;
    handle.addEventListener("input", () => this.#cut());
    gain.addEventListener("input", () => this.#paint());
    over.addEventListener("change", () => this.#paint());
    scrub.addEventListener("input", () => {
      this.#stop();
      this.scale = Number(scrub.value);
    });
    play.addEventListener("click", () => (this.#timer === null ? this.#play() : this.#stop()));
  }

  #assemble() {
    const p = this.#parts;
    p.stage = make(
      "div",
      { class: "fv-stage" },
      p.reference,
      p.picture,
      p.canvas,
      make("span", { class: "fv-knob", "aria-hidden": "true" }),
      p.none,
      p.handle,
      p.left,
      p.right,
    );
    p.gainRow = make("div", { class: "fv-row fv-gain-row" }, make("span", {}, "Amplified"), p.gain, p.gainText);
    p.scrubRow = make("div", { class: "fv-row fv-scrub-row" }, p.play, p.scrub, make("label", {}, p.over, " map"));
    this.replaceChildren(p.tabs, p.stage, p.gainRow, p.scrubRow, p.strip, p.caption, p.legend);
  }

  #refresh() {
    if (this.#parts === null) return;
    if (!this.#has(this.#view)) this.#view = Object.keys(VIEWS).find((view) => this.#has(view)) ?? this.#view;
    const p = this.#parts;
    const { subject, reference, picture, referenceName, pictureName } = this.#pair;
    const said = (name) => [subject, name].filter(Boolean).join(", ");
    this.dataset.view = this.#view;
    for (const input of p.tabs.querySelectorAll("input")) {
      input.checked = input.value === this.#view;
      input.parentElement.hidden = !this.#has(input.value);
    }
    this.#source(p.reference, reference, said(referenceName));
    this.#source(p.picture, picture, said(pictureName));
    p.left.textContent = referenceName;
    p.right.textContent = pictureName;
    this.#cut();
    this.#strip();
    this.#paint();
  }

  #source(image, url, said) {
    image.hidden = url === null;
    image.alt = said;
    if (url !== null && image.getAttribute("src") !== url) image.src = url;
  }

  #cut() {
    const { stage, handle } = this.#parts;
    const { referenceName, pictureName } = this.#pair;
    stage.style.setProperty("--fv-cut", `${handle.value}%`);
    handle.setAttribute("aria-valuetext", `${handle.value} % ${referenceName}, ${100 - handle.value} % ${pictureName}`);
  }

  /** Small token maps of all scales; a click shows the scale, and the range above does the same for the keyboard. */
  #strip() {
    const { strip, scrub } = this.#parts;
    const { scales } = this.#pair;
    scrub.max = Math.max(0, scales.length - 1);
    scrub.value = this.#scale;
    scrub.setAttribute("aria-valuetext", scales.length ? this.#described() : "");
    if (strip.fvScales !== scales) {
      strip.fvScales = scales;
      strip.replaceChildren(...scales.map((scale, index) => this.#thumbnail(scale, index)));
    }
    [...strip.children].forEach((child, index) => child.classList.toggle("fv-now", index === this.#scale));
  }

  #thumbnail(scale, index) {
    const canvas = make("canvas", { width: scale.columns, height: scale.rows });
    if (scale.depth !== null) {
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(scale.columns, scale.rows);
      paintTokens(pixels, scale);
      context.putImageData(pixels, 0, 0);
    }
    const choose = () => {
      this.#stop();
      this.scale = index;
    };
    const kind = scale.depth === null ? "fv-thumb fv-skipped" : "fv-thumb";
    return make(
      "button",
      { type: "button", class: kind, tabindex: "-1", "aria-label": `Scale ${scale.scale}`, onclick: choose },
      canvas,
    );
  }

  #described() {
    const scale = this.#pair.scales[this.#scale];
    return `scale ${scale.scale}, ${scale.rows} x ${scale.columns}: ${scale.caption}`;
  }

  async #paint() {
    this.#turn += 1;
    const turn = this.#turn;
    const p = this.#parts;
    const isCanvas = ["difference", "flip", "compute"].includes(this.#view);
    p.none.hidden = true;
    p.legend.replaceChildren();
    if (!isCanvas) p.caption.textContent = "";
    if (!isCanvas || !this.#has(this.#view)) return;
    const images = await Promise.all(this.#sources().map(decoded));
    if (turn !== this.#turn || images.includes(null)) return;
    if (this.#view === "difference") this.#paintDifference(images);
    else if (this.#view === "flip") this.#paintFlip(images);
    else this.#paintCompute(images);
    p.canvas.setAttribute("aria-label", `${VIEWS[this.#view]}: ${p.caption.textContent}`);
  }

  #sources() {
    const { reference, picture, flip, scales } = this.#pair;
    if (this.#view === "difference") return [reference, picture];
    if (this.#view === "flip") return [flip];
    return [scales[this.#scale].image ?? picture ?? reference];
  }

  #paintDifference(images) {
    const { gain, gainText, caption, legend } = this.#parts;
    const factor = 2 ** Number(gain.value);
    const [reference, picture] = images.map((image) => pixelsOf(image, 0));
    const target = new ImageData(reference.width, reference.height);
    const { most, share } = paintDifference(target, reference, picture, factor);
    this.#put(target);
    gainText.textContent = `x${factor}`;
    gain.setAttribute("aria-valuetext", `times ${factor}`);
    caption.textContent = most
      ? `largest difference ${most} of 255; ${(100 * share).toFixed(1)} % of the pixels differ by more than 8`
      : "the images are equal, byte by byte";
    legend.append(chip("fv-magma", ""), `0 to ${Math.round(255 / factor)} levels`);
  }

  #paintFlip(images) {
    const grey = pixelsOf(images[0], 0);
    const target = new ImageData(grey.width, grey.height);
    paintHeat(target, grey);
    this.#put(target);
    const mean = grey.data.reduce((sum, value, i) => sum + (i % 4 ? 0 : value), 0) / (grey.data.length / 4) / 255;
    this.#parts.caption.textContent = `perceived difference, mean FLIP ${mean.toFixed(2)}`;
    this.#parts.legend.append(chip("fv-magma", ""), "0 to 1");
  }

  #paintCompute(images) {
    const { caption, legend, none, over } = this.#parts;
    const scale = this.#pair.scales[this.#scale];
    const image = pixelsOf(images[0], SMALLEST_CANVAS);
    const target = new ImageData(image.width, image.height);
    if (over.checked) paintCompute(target, image, scale);
    this.#put(over.checked ? target : image);
    none.hidden = scale.depth !== null;
    caption.textContent = this.#described();
    legend.append(
      chip("fv-dark", "did not run"),
      chip("fv-viridis", "few to most blocks"),
      chip("fv-full", "all blocks"),
    );
  }

  #put(pixels) {
    const { canvas } = this.#parts;
    canvas.width = pixels.width;
    canvas.height = pixels.height;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  #play() {
    const { scales } = this.#pair;
    if (this.#scale >= scales.length - 1) this.scale = 0;
    this.#parts.play.textContent = "Stop";
    this.#timer = setInterval(() => {
      if (this.#scale >= scales.length - 1) this.#stop();
      else this.scale = this.#scale + 1;
    }, MS_PER_SCALE);
  }

  #stop() {
    if (this.#timer !== null) clearInterval(this.#timer);
    this.#timer = null;
    if (this.#parts !== null) this.#parts.play.textContent = "Play";
  }
}

function chip(kind, text) {
  return make("span", { class: "fv-key" }, make("i", { class: `fv-chip ${kind}` }), text);
}

/** The image, once it can be drawn; null if it cannot be. */
async function decoded(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return null;
  }
  return image;
}

/** Pixels of an image, enlarged to a longer side of at least `side`. */
function pixelsOf(image, side) {
  const factor = Math.max(1, side / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = make("canvas", {
    width: Math.round(factor * image.naturalWidth),
    height: Math.round(factor * image.naturalHeight),
  });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

customElements.define("foveate-view", FoveateView);
