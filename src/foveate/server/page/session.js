/** Requests and what comes of them: runs that form, and the full runs that they are compared with. Nothing here draws. */
import { GoneError, generate } from "./api.js";
import { fullBody, titleOf } from "./choice.js";
import { addScale, finish, newRun } from "./run.js";

/** A scale stays on the page at least so long, as a small model is done before an eye has seen anything. */
const MS_PER_SCALE = 120;

export class Session {
  #history;
  #model;
  #told;
  #abort = null;

  /**
   * `told` is an object of functions: accepted(event, runs), waits(position, runs), scale(run, scale), done(run),
   * failed(error, runs, again), ended().
   */
  constructor({ history, model, told }) {
    this.#history = history;
    this.#model = model;
    this.#told = told;
  }

  get isRunning() {
    return this.#abort !== null;
  }

  /** Ends what runs now. */
  stop() {
    this.#abort?.abort();
  }

  /** Generates the images of a request; resolves to its runs, of which those that failed have no picture. */
  async start(body, { isReference = false, isPaced = true } = {}) {
    this.stop();
    const abort = new AbortController();
    this.#abort = abort;
    const runs = Array.from({ length: body.n }, (_, index) => {
      const own = { ...body, n: 1, seed: body.seed + index };
      return newRun({ model: this.#model, body: own, title: titleOf(own), isReference });
    });
    try {
      await this.#follow(body, runs, { signal: abort.signal, isPaced: isPaced && runs.length === 1 });
    } catch (error) {
      if (this.#abort !== abort) return runs;
      this.#told.failed(error, runs, () => this.start(body, { isReference, isPaced }));
    } finally {
      if (this.#abort === abort) {
        this.#abort = null;
        this.#told.ended();
      }
    }
    return runs;
  }

  /** The full run of the same image; one that is there is taken. */
  async reference(run) {
    const known = this.#history.reference(run);
    if (known !== null) return known;
    const [reference] = await this.start(fullBody(run.body), { isReference: true, isPaced: false });
    return reference.picture === null ? null : reference;
  }

  async #follow(body, runs, { signal, isPaced }) {
    const pace = isPaced && !matchMedia("(prefers-reduced-motion: reduce)").matches ? MS_PER_SCALE : 0;
    let next = 0;
    for await (const event of generate(body, signal)) {
      const run = runs[event.image_index ?? 0];
      if (event.type === "foveate.accepted") this.#accepted(event, runs);
      else if (event.type === "foveate.queue") this.#told.waits(event.position, runs);
      else if (event.type === "foveate.scale") {
        const scale = addScale(run, event);
        await after(next);
        signal.throwIfAborted();
        next = performance.now() + pace;
        this.#told.scale(run, scale);
      } else if (event.type === "image_generation.completed") {
        await after(next);
        await this.#done(finish(run, event));
      }
    }
    if (runs.some((run) => run.picture === null)) throw new GoneError(true);
  }

  #accepted(event, runs) {
    for (const [index, run] of runs.entries()) {
      run.size = event.size ?? run.size;
      run.seed = event.seeds?.[index] ?? run.seed;
      run.policy = event.policy ?? run.policy;
      run.numScales = event.num_scales ?? run.numScales;
    }
    this.#told.accepted(event, runs);
  }

  async #done(run) {
    await this.#history.put(run);
    this.#told.done(run);
  }
}

function after(moment) {
  const wait = moment - performance.now();
  return wait > 0 ? new Promise((resolve) => setTimeout(resolve, wait)) : undefined;
}
