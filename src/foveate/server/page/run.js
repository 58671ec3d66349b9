/**
 * A run: one image of one request, from its first scale to the finished file. Plain data, so that it can be stored:
 *
 *   { id, when, prompt, size, seed, title, policy, key, body, numScales, scales, picture, ... }
 *
 * Scales are those of <foveate-view> with times, tokens and FLOPs beside them; images are blobs.
 */

/** What of a request decides the image of the full run, so that runs that share it share their reference. */
export function referenceKey(model, body) {
  const { prompt, negative_prompt, size, seed, guidance_scale, temperature } = body;
  return JSON.stringify([
    model,
    prompt,
    negative_prompt ?? null,
    size,
    seed,
    guidance_scale ?? null,
    temperature ?? null,
  ]);
}

/** A run that has begun; `body` is the request of this image alone. */
export function newRun({ model, body, title, isReference = false }) {
  return {
    id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`,
    when: Date.now(),
    model,
    body,
    title,
    isReference,
    key: referenceKey(model, body),
    prompt: body.prompt,
    seed: body.seed,
    size: body.size,
    policy: null,
    numScales: null,
    scales: [],
    picture: null,
    done: null,
    isFull: body.policy === "full",
  };
}

/** Adds what `foveate.scale` says; returns the scale. */
export function addScale(run, event) {
  const [rows, columns] = event.grid;
  const { tokens, flops } = event;
  const scale = {
    scale: event.scale,
    rows,
    columns,
    blocks: event.depth?.num_blocks ?? 1,
    depth: depthOf(event, rows * columns),
    ms: event.ms,
    company: event.company ?? 1,
    tokens,
    flops,
    caption: "",
    image: event.b64_json ? blobOf(event.b64_json, "image/jpeg") : undefined,
  };
  scale.caption = caption(scale);
  run.numScales = event.num_scales;
  run.scales.push(scale);
  return scale;
}

/** Adds what `image_generation.completed` says. */
export function finish(run, event) {
  const { b64_json, output_format, size, foveate } = event;
  run.picture = blobOf(b64_json, `image/${output_format ?? "png"}`);
  run.size = size ?? run.size;
  run.seed = foveate.seed ?? run.seed;
  run.policy = foveate.policy ?? run.policy;
  // A full run that a deadline cut is no reference.
  run.isFull = run.policy?.spec === "full" && foveate.is_coarse !== true;
  run.done = {
    ms: foveate.ms ?? {},
    flops: foveate.flops,
    tokens: foveate.tokens,
    warnings: foveate.warnings ?? [],
    isCoarse: foveate.is_coarse === true,
    command: foveate.command ?? "",
    curl: foveate.curl ?? "",
  };
  return run;
}

/** Milliseconds of the transformer: the sum of the scales. */
export function transformerMs(run) {
  return run.scales.reduce((sum, scale) => sum + scale.ms, 0);
}

function depthOf(event, count) {
  if (!event.depth || event.tokens.run === 0) return event.depth ? null : new Int16Array(count).fill(1);
  return Int16Array.from(atob(event.depth.b64), (letter) => letter.charCodeAt(0) || -1);
}

function caption({ depth, blocks, tokens, ms, company }) {
  if (depth === null) return `did not run, ${printMs(ms)}`;
  const ran = depth.reduce((sum, blocksRun) => sum + Math.max(0, blocksRun), 0);
  const share = Math.round((100 * ran) / (blocks * depth.length));
  const beside = company > 1 ? `, in a batch of ${company} images` : "";
  return `${tokens.run}/${tokens.full} tokens, ${share} % of blocks, ${printMs(ms)}${beside}`;
}

/** Bytes of base64 as a blob. A strict policy forbids fetching data URLs, so they are decoded here. */
export function blobOf(b64, type) {
  const text = atob(b64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type });
}

/** Milliseconds to read: three digits, seconds from one on. */
export function printMs(ms) {
  if (!Number.isFinite(ms)) return "n/a";
  return ms >= 1000 ? `${(ms / 1000).toFixed(ms >= 10_000 ? 1 : 2)} s` : `${ms.toFixed(ms >= 10 ? 0 : 1)} ms`;
}

/** FLOPs to read. */
export function printFlops(flops) {
  if (!Number.isFinite(flops)) return "n/a";
  const [unit, power] = [
    ["T", 12],
    ["G", 9],
    ["M", 6],
  ].find(([, p]) => flops >= 10 ** p) ?? ["M", 6];
  return `${(flops / 10 ** power).toPrecision(3)} ${unit}FLOPs`;
}

/** How much ran of how much, in the unit of the latter. */
export function printShare(run, full) {
  const [number, unit] = printFlops(full).split(" ");
  return `${((run / full) * Number(number)).toPrecision(3)} of ${number} ${unit}`;
}
