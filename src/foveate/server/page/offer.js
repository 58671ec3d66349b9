/** What the server offers: its model, sizes, policies and presets, in the words of the form. */
import { getJson } from "./api.js";

/** Prompts that a model knows: the bundled ones, those of ImageNet's classes, and all others. */
const EMOJI = ["red apple", "hamburger", "penguin", "cactus", "sailboat", "strawberry"];
const CLASSES = ["goldfish", "golden retriever", "volcano", "lighthouse", "espresso", "hot air balloon"];
const ANY = ["a red apple on a wooden table", "a lighthouse in a storm", "a cat in a spacesuit", "a bowl of ramen"];

/** Everything that the form needs to know. */
export async function readOffer() {
  const [models, sizes, policies] = await Promise.all(["v1/models", "v1/sizes", "v1/policies"].map(getJson));
  const [model] = models.data;
  const possible = policies.data.filter((policy) => policy.is_possible);
  return {
    model: model.id,
    weights: `${model.id} ${model.foveate.weights.sha256}`,
    hasNegatives: model.foveate.has_negative_prompts,
    examples: model.id.startsWith("emoji") ? EMOJI : model.foveate.names_classes ? CLASSES : ANY,
    sizes: sizes.data.filter((size) => size.is_allowed || size.is_default),
    policies: [...possible, ...policies.presets].map((policy) => policy.name),
    presets: policies.presets.filter((preset) => preset.bound?.length && preset.is_possible).map(described),
  };
}

/** A preset that somebody measured, for the row of levels. */
function described({ name, title, bound, measured_on, is_measured }) {
  const told = [bound].flat().map((one) => `${one.replace("psnr.mean", "mean PSNR").replace(">=", "\u2265")} dB`);
  const where = is_measured ? "measured on these weights" : `measured on ${measured_on}, and not on this model`;
  return {
    name,
    text: capital(name.replace(/^preset-/, "")),
    isMeasured: is_measured === true,
    about: `${capital(title.replace(/\.$/, ""))} (${told.join(", ")}, ${where}).`,
  };
}

function capital(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}`;
}
