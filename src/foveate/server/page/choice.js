/**
 * What the reader chose, as a request, as a title, and as the part of a link behind "#".
 *
 *   { prompt, negative, level: "full" | "preset:NAME" | "share" | "own", share, own, size, seed, isLocked, count,
 *     compares, guidance, temperature, deadlineMs, onLate }
 */

export const NOTHING_CHOSEN = {
  prompt: "",
  negative: "",
  level: "full",
  share: 60,
  own: "",
  size: "auto",
  seed: 7,
  isLocked: false,
  count: 1,
  compares: true,
  guidance: "",
  temperature: "",
  deadlineMs: "",
  onLate: "coarse",
};

const LINKED = ["prompt", "negative", "level", "share", "own", "size", "seed", "guidance", "temperature"];
const NUMBERS = new Set(["share", "seed"]);

/** A seed that is short enough to be read out. */
export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
}

/** The body of the request, without what only a stream needs. */
export function bodyOf(choice) {
  const body = { prompt: choice.prompt.trim(), size: choice.size, seed: choice.seed, n: choice.count };
  const { level } = choice;
  if (level === "share") body.budget = choice.share / 100;
  else body.policy = level === "own" ? choice.own.trim() : level.replace(/^preset:/, "");
  if (choice.negative.trim()) body.negative_prompt = choice.negative.trim();
  if (choice.guidance !== "") body.guidance_scale = Number(choice.guidance);
  if (choice.temperature !== "") body.temperature = Number(choice.temperature);
  if (choice.deadlineMs !== "") Object.assign(body, deadline(choice));
  return body;
}

/** A deadline takes what compute it needs: it goes with a policy, and not with a share. */
function deadline({ deadlineMs, onLate }) {
  return { latency_budget_ms: Number(deadlineMs), on_late: onLate };
}

/** The same image in full: the reference of a run. A deadline would cut it short, so it has none. */
export function fullBody(body) {
  const { budget, latency_budget_ms, on_late, ...rest } = body;
  return { ...rest, n: 1, policy: "full" };
}

/** How a request is called on the page. */
export function titleOf(body) {
  if (body.budget !== undefined) return `share ${Math.round(100 * body.budget)} %`;
  if (body.policy === "full") return "full run";
  return body.policy.replace(/^preset-/, "");
}

/** Behind "#" in a link that fills the form. */
export function hashOf(choice) {
  const found = LINKED.filter((name) => choice[name] !== NOTHING_CHOSEN[name] || name === "seed");
  return new URLSearchParams(found.map((name) => [name, String(choice[name])])).toString();
}

/** What a link chose; unknown names and numbers that are none are left out. */
export function chosenBy(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const found = {};
  for (const name of LINKED) {
    const text = given.get(name);
    if (text === null) continue;
    if (!NUMBERS.has(name)) found[name] = text;
    else if (/^\d+$/.test(text) && Number.isSafeInteger(Number(text))) found[name] = Number(text);
  }
  if (found.seed !== undefined) found.isLocked = true;
  return found;
}
