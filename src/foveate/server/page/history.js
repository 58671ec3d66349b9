/**
 * Runs that the browser keeps, in IndexedDB: the latest ones and their references, and no more. Where a browser forbids
 * that, they last until the page is closed, and `isKept` says so.
 */

import { release } from "./urls.js";

const [DATABASE, STORE, VERSION] = ["foveate", "runs", 1];

/** Runs on the page at most; the full runs that they are compared with are kept beside them. */
export const MOST_RUNS = 40;
/** Of all images together; the latest run is kept whatever its size. */
const MOST_BYTES = 64 * 2 ** 20;

export class History {
  #database = null;
  #runs = new Map();

  /** Opens the store and reads what is in it. */
  static async open() {
    const history = new History();
    try {
      history.#database = await opened();
      const stored = await answer(history.#store("readonly").getAll());
      stored.sort((a, b) => a.when - b.when);
      for (const run of stored) history.#runs.set(run.id, run);
    } catch {
      history.#database = null;
    }
    return history;
  }

  /** Whether runs outlive the page. */
  get isKept() {
    return this.#database !== null;
  }

  /** Runs that the reader asked for, the latest first. */
  get shown() {
    return [...this.#runs.values()].filter((run) => !run.isReference).reverse();
  }

  get(id) {
    return this.#runs.get(id) ?? null;
  }

  /** The full run of the same image, if it is there. */
  reference(run) {
    const found = [...this.#runs.values()].filter((one) => one.key === run.key && one.isFull && one.picture !== null);
    return found.at(-1) ?? null;
  }

  /** Other finished runs of the same image, oldest first. */
  siblings(run) {
    return [...this.#runs.values()].filter((one) => one.key === run.key && one.picture !== null);
  }

  /** Adds a run, or a new state of it, and drops the oldest beyond the limit. */
  async put(run) {
    this.#runs.set(run.id, run);
    const gone = [];
    for (let kept = this.shown; kept.length > 1 && this.#isTooMuch(kept); kept = this.shown) {
      gone.push(...this.#drop([kept.at(-1)]), ...this.#dropLonely());
    }
    await this.#write((store) => {
      store.put(run);
      for (const id of gone) store.delete(id);
    });
  }

  /** Deletes a run, and references that nothing is compared with any more. */
  async delete(id) {
    const gone = [...this.#drop([this.#runs.get(id)]), ...this.#dropLonely()];
    await this.#write((store) => gone.forEach((one) => store.delete(one)));
  }

  async clear() {
    this.#drop([...this.#runs.values()]);
    await this.#write((store) => store.clear());
  }

  #isTooMuch(kept) {
    const blobs = [...this.#runs.values()].flatMap((run) => [run.picture, ...run.scales.map((scale) => scale.image)]);
    return kept.length > MOST_RUNS || blobs.reduce((sum, blob) => sum + (blob?.size ?? 0), 0) > MOST_BYTES;
  }

  #dropLonely() {
    const wanted = new Set(this.shown.map((run) => run.key));
    return this.#drop([...this.#runs.values()].filter((run) => run.isReference && !wanted.has(run.key)));
  }

  /** Forgets runs, and returns their ids. */
  #drop(runs) {
    for (const run of runs) {
      this.#runs.delete(run.id);
      release(run);
    }
    return runs.map((run) => run.id);
  }

  /** A store that is full or gone ends the keeping, never the page. */
  async #write(change) {
    if (this.#database === null) return;
    try {
      const store = this.#store("readwrite");
      const done = new Promise((resolve, reject) => {
        store.transaction.oncomplete = resolve;
        store.transaction.onerror = store.transaction.onabort = () => reject(store.transaction.error);
      });
      change(store);
      await done;
    } catch {
      this.#database = null;
    }
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }
}

function opened() {
  const request = indexedDB.open(DATABASE, VERSION);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return answer(request);
}

function answer(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}
