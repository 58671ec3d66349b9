/** The form: it shows what the server offers, and says what was chosen. */
import { make } from "./viz/dom.js";
import { NOTHING_CHOSEN, newSeed } from "./choice.js";

const byId = (id) => document.getElementById(id);
const TEXTS = ["prompt", "negative", "own", "guidance", "temperature"];

export class Form {
  #presets = [];
  #level = "full";
  #isLocked = false;

  /** `onSubmit` is called when the reader wants an image. */
  constructor({ onSubmit, onStop }) {
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      onSubmit();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      onSubmit();
    });
    byId("stop").addEventListener("click", onStop);
    byId("share").addEventListener("input", () => this.#choose("share"));
    byId("lock").addEventListener("click", () => this.#lock(!this.#isLocked));
    byId("seed").addEventListener("input", () => this.#lock(true));
    byId("form").addEventListener("input", (event) => this.complain(event.target.id, ""));
    this.choice = NOTHING_CHOSEN;
  }

  /** Fills the lists; `examples` start a request at once. */
  offer({ sizes, presets, policies, examples, hasNegatives, onExample }) {
    this.#presets = presets;
    byId("negative").parentElement.hidden = !hasNegatives;
    byId("size").replaceChildren(
      ...sizeGroup(
        "Trained",
        sizes.filter((size) => size.is_trained),
      ),
      ...sizeGroup(
        "Not trained",
        sizes.filter((size) => !size.is_trained),
      ),
    );
    byId("policies").replaceChildren(...policies.map((name) => make("option", { value: name })));
    byId("levels").replaceChildren(
      ...[{ value: "full", text: "Full" }, ...presets.map(({ name, text }) => ({ value: `preset:${name}`, text }))].map(
        (level) => this.#radio(level),
      ),
      this.#radio({ value: "share", text: "Share" }),
      this.#radio({ value: "own", text: "Policy" }),
    );
    byId("examples").replaceChildren(
      make("span", { class: "sv-try" }, "Try"),
      ...examples.map((text) =>
        make("button", { type: "button", class: "sv-chip", onclick: () => onExample(text) }, text),
      ),
    );
    this.#choose(this.#level);
  }

  /** What is chosen now; see choice.js. */
  get choice() {
    const text = Object.fromEntries(TEXTS.map((name) => [name, byId(name).value]));
    return {
      ...NOTHING_CHOSEN,
      ...text,
      level: this.#level,
      share: Number(byId("share").value),
      size: byId("size").value || NOTHING_CHOSEN.size,
      seed: this.#seed(),
      isLocked: this.#isLocked,
      count: Number(byId("count").value),
      compares: byId("compares").checked,
      deadlineMs: byId("deadline").value.trim(),
      onLate: byId("late").value,
    };
  }

  set choice(choice) {
    for (const name of TEXTS) byId(name).value = choice[name];
    byId("share").value = choice.share;
    byId("size").value = choice.size;
    if (byId("size").selectedIndex < 0) byId("size").selectedIndex = 0;
    byId("seed").value = choice.seed;
    byId("count").value = choice.count;
    byId("compares").checked = choice.compares;
    byId("deadline").value = choice.deadlineMs;
    byId("late").value = choice.onLate;
    byId("form").querySelector(".sv-more").open ||= [
      choice.negative,
      choice.guidance,
      choice.temperature,
      choice.deadlineMs,
    ].some(Boolean);
    this.#lock(choice.isLocked);
    this.#choose(choice.level);
  }

  /** A new seed for the next request, unless it is locked. */
  reseed() {
    if (!this.#isLocked) byId("seed").value = newSeed();
  }

  /** Whether a request is under way. */
  set isRunning(isRunning) {
    byId("stop").hidden = !isRunning;
    byId("go").textContent = isRunning ? "Start anew" : "Generate";
  }

  /** Says below a field what is wrong with it and leads there; an empty text takes that back. */
  complain(field, text) {
    const line = byId(`${field}-error`);
    if (line === null) return;
    line.textContent = text;
    byId(field).toggleAttribute("aria-invalid", text !== "");
    if (text) byId(field).setAttribute("aria-invalid", "true");
    if (!text) return;
    byId(field).closest("details")?.setAttribute("open", "");
    byId(field).focus();
  }

  /** Checks what the server need not be asked for; returns whether all is well. */
  check() {
    const { prompt, level, own, seed } = this.choice;
    const wrong = [
      [!prompt.trim(), "prompt", "Write what the image shows."],
      [level === "own" && !own.trim(), "own", "Write a policy, or take another level."],
      [!Number.isSafeInteger(seed) || seed < 0, "seed", "A whole number from 0 on."],
      ...["guidance", "temperature", "deadline"].map((id) => [isNoNumber(byId(id).value), id, "A number."]),
    ].find(([isWrong]) => isWrong);
    if (wrong !== undefined) this.complain(wrong[1], wrong[2]);
    return wrong === undefined;
  }

  #radio({ value, text }) {
    const input = make("input", { type: "radio", name: "level", value });
    input.addEventListener("change", () => this.#choose(value));
    return make("label", { class: "sv-level" }, input, make("span", {}, text));
  }

  #choose(level) {
    this.#level = level;
    for (const input of byId("levels").querySelectorAll("input")) input.checked = input.value === level;
    byId("share-text").textContent = level === "share" ? `${byId("share").value} %` : "";
    byId("share").setAttribute("aria-valuetext", `${byId("share").value} %`);
    byId("own-row").hidden = level !== "own";
    byId("form").dataset.level = level.replace(/:.*/, "");
    byId("level-text").textContent = this.#about(level);
  }

  #about(level) {
    if (level === "full") return "Every token, block and branch runs. All else is compared with it.";
    if (level === "share") return "The library turns the dial of a policy until the transformer spends this share.";
    if (level === "own") return "Name and fields, as on the command line; | joins several.";
    return this.#presets.find((preset) => `preset:${preset.name}` === level)?.about ?? "";
  }

  #lock(isLocked) {
    this.#isLocked = isLocked;
    byId("lock").setAttribute("aria-pressed", String(isLocked));
    byId("lock").title = isLocked ? "The seed stays" : "Every image gets a new seed";
  }

  #seed() {
    const text = byId("seed").value.trim();
    return /^\d+$/.test(text) ? Number(text) : Number.NaN;
  }
}

function sizeGroup(label, sizes) {
  const options = sizes.map(({ size, width, height }) =>
    make("option", { value: size }, `${width}\u2009\u00d7\u2009${height}`),
  );
  return options.length ? [make("optgroup", { label }, ...options)] : [];
}

function isNoNumber(text) {
  return text.trim() !== "" && !Number.isFinite(Number(text));
}
