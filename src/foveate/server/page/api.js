/** The public API of `foveate serve`. Addresses are relative, so that the page also works below a path of a proxy. */
import { eventsOf } from "./sse.js";

const KEY = "foveate-key";

/** An answer that is an error: OpenAI's envelope, the status, and how long to wait. */
export class ApiError extends Error {
  constructor({ status, message, code = null, param = null, waitS = null }) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, code, param, waitS });
  }
}

/** The connection broke, or there was none; `hasBegun` tells whether something had come before. */
export class GoneError extends Error {
  constructor(hasBegun) {
    super(hasBegun ? "the connection broke" : "the server does not answer");
    this.name = "GoneError";
    this.hasBegun = hasBegun;
  }
}

/** The key lives as long as the tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** The answer to a GET, as JSON. */
export async function getJson(path) {
  const response = await reach(path, { headers: authorization() });
  return response.json();
}

/** The events of one request of images; aborting `signal` stops the work on the server at its next scale. */
export async function* generate(body, signal) {
  const response = await reach("v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...authorization() },
    body: JSON.stringify({ ...body, stream: true, trace: true }),
    signal,
  });
  let hasBegun = false;
  try {
    for await (const event of eventsOf(response.body)) {
      hasBegun = true;
      if (event.type === "error") throw new ApiError({ status: null, ...event.error });
      yield event;
    }
  } catch (error) {
    throw error instanceof TypeError || error instanceof SyntaxError ? new GoneError(hasBegun) : error;
  }
}

function authorization() {
  return key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", ...options });
  } catch (error) {
    throw error instanceof TypeError ? new GoneError(false) : error;
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const told = body?.error ?? {};
  const waitS = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError({
    status: response.status,
    message: typeof told.message === "string" ? told.message : `the server answered ${response.status}`,
    code: told.code ?? null,
    param: told.param ?? null,
    waitS: Number.isFinite(waitS) ? Math.max(0, waitS) : null,
  });
}
