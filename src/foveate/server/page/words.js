/** What the page says when something does not work: a title, what happened, and what can be done. */
import { ApiError, GoneError } from "./api.js";

/** The field of the form that a parameter of the API belongs to. */
export const FIELDS = {
  prompt: "prompt",
  negative_prompt: "negative",
  size: "size",
  seed: "seed",
  n: "count",
  policy: "own",
  budget: "share",
  guidance_scale: "guidance",
  temperature: "temperature",
  latency_budget_ms: "deadline",
};

/**
 * @returns {{ title: string, text: string, waitS: number | null, canRetry: boolean, field: string | null }}
 *   `waitS` is how long the server asks to wait; `field` is what to correct.
 */
export function said(error, run = null) {
  const reached =
    run === null || !run.scales.length ? "" : ` ${run.scales.length} of ${run.numScales} scales had come.`;
  if (error.name === "AbortError")
    return notice("Stopped", `The server ends this request at its next scale.${reached}`);
  if (error instanceof GoneError) {
    return error.hasBegun
      ? notice("The connection broke", `The answer ended before the image was done.${reached}`)
      : notice("No answer", "The server has stopped, or the network is down.");
  }
  if (error instanceof ApiError) return ofStatus(error, reached);
  return notice("The page failed", `${error.name}: ${error.message}`);
}

function ofStatus(error, reached) {
  const { status, code, message, waitS, param } = error;
  if (status === 429) return notice("The server is busy", message, { waitS });
  if (status === 503 || code === "closing") return notice("The server is not ready", message, { waitS });
  if (status === 401 || status === 403) return notice("The server wants an API key", message);
  if (code === "late") return notice("Not done in time", message + reached);
  if (status !== null && status >= 400 && status < 500) {
    return notice("The request was refused", message, { canRetry: false, field: FIELDS[param] ?? null });
  }
  return notice("The server failed", message + reached);
}

function notice(title, text, { waitS = null, canRetry = true, field = null } = {}) {
  return { title, text: sentence(text), waitS, canRetry, field };
}

/** Messages of the API begin small and have no full stop. */
function sentence(text) {
  const trimmed = text.trim();
  if (!trimmed) return "";
  return `${trimmed[0].toUpperCase()}${trimmed.slice(1)}${/[.!?]$/.test(trimmed) ? "" : "."}`;
}
