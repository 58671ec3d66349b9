/** Addresses of blobs, one for each, given back when its run is gone. */

const urls = new WeakMap();

/** The address of a blob. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Gives the addresses of a run's images back. */
export function release(run) {
  for (const blob of [run.picture, ...run.scales.map((scale) => scale.image)]) {
    if (blob && urls.has(blob)) URL.revokeObjectURL(urls.get(blob));
    if (blob) urls.delete(blob);
  }
}
