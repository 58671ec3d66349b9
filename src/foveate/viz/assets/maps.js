/**
 * Pixels of the difference, the FLIP map and the compute map. Every function writes into an ImageData and reads nothing
 * else, so that it can be called for any pair and at any time.
 */

const VIRIDIS = [
  [68, 1, 84],
  [59, 82, 139],
  [33, 145, 140],
  [94, 201, 98],
  [253, 231, 37],
];
const MAGMA = [
  [0, 0, 4],
  [81, 18, 124],
  [183, 55, 121],
  [252, 137, 97],
  [252, 253, 191],
];
const FULL = [236, 236, 228];
const DARK = [26, 27, 30];

/** Colour of a share in [0, 1] along evenly spaced stops. */
function along(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return stops[low].map((from, i) => from + (stops[low + 1][i] - from) * (place - low));
}

const MAGMA_256 = Array.from({ length: 256 }, (_, i) => along(MAGMA, i / 255));

function put(data, i, colour) {
  data[i] = colour[0];
  data[i + 1] = colour[1];
  data[i + 2] = colour[2];
  data[i + 3] = 255;
}

/** Largest difference of the three channels, times `gain`; returns it in levels of 255, and the share above 8. */
export function paintDifference(target, reference, picture, gain) {
  const [out, a, b] = [target.data, reference.data, picture.data];
  let most = 0;
  let above = 0;
  for (let i = 0; i < out.length; i += 4) {
    const found = Math.max(Math.abs(a[i] - b[i]), Math.abs(a[i + 1] - b[i + 1]), Math.abs(a[i + 2] - b[i + 2]));
    most = Math.max(most, found);
    above += found > 8 ? 1 : 0;
    put(out, i, MAGMA_256[Math.min(255, Math.round(found * gain))]);
  }
  return { most, share: above / (out.length / 4) };
}

/** PSNR of two images over all pixels and channels, in dB; equal ones get 100, and nothing gets more. */
export function psnr(reference, picture) {
  const [a, b] = [reference.data, picture.data];
  let sum = 0;
  for (let i = 0; i < a.length; i += 4) for (let c = i; c < i + 3; c += 1) sum += (a[c] - b[c]) * (a[c] - b[c]);
  const mean = sum / (0.75 * a.length);
  return mean === 0 ? 100 : Math.min(100, 10 * Math.log10((255 * 255) / mean));
}

/** A grey map, coloured like the difference. */
export function paintHeat(target, grey) {
  for (let i = 0; i < target.data.length; i += 4) put(target.data, i, MAGMA_256[grey.data[i]]);
}

/**
 * One scale over the image: tokens that ran all blocks as they are, with fewer blocks tinted, the others dark.
 * `scale` has rows, columns, blocks, and `depth` per token: -1 where it did not run, null where no token of it did.
 */
export function paintCompute(target, image, scale) {
  const [out, pixels] = [target.data, image.data];
  const { width, height } = target;
  const hasLines = width / scale.columns >= 9;
  for (let y = 0, i = 0; y < height; y += 1) {
    const row = Math.floor((y * scale.rows) / height);
    const isTop = hasLines && row > 0 && Math.floor(((y - 1) * scale.rows) / height) !== row;
    for (let x = 0; x < width; x += 1, i += 4) {
      const column = Math.floor((x * scale.columns) / width);
      const isEdge = isTop || (hasLines && column > 0 && Math.floor(((x - 1) * scale.columns) / width) !== column);
      const depth = scale.depth === null ? null : scale.depth[row * scale.columns + column];
      shade(out, pixels, i, depth, scale.blocks);
      if (isEdge) for (let c = 0; c < 3; c += 1) out[i + c] *= 0.8;
    }
  }
}

function shade(out, pixels, i, depth, blocks) {
  const grey = (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3;
  if (depth === null)
    put(
      out,
      i,
      [222, 224, 228].map((pale) => 0.25 * grey + 0.75 * pale),
    );
  else if (depth < 0) put(out, i, [0.22 * grey + 12, 0.22 * grey + 12, 0.22 * grey + 12]);
  else if (depth >= blocks) put(out, i, [pixels[i], pixels[i + 1], pixels[i + 2]]);
  else {
    const tint = along(VIRIDIS, depth / blocks);
    put(
      out,
      i,
      [0, 1, 2].map((c) => 0.45 * pixels[i + c] + 0.55 * tint[c]),
    );
  }
}

/** One pixel per token, for a thumbnail of a scale that ran. */
export function paintTokens(target, scale) {
  for (let t = 0; t < scale.depth.length; t += 1) {
    const depth = scale.depth[t];
    put(target.data, 4 * t, depth < 0 ? DARK : depth >= scale.blocks ? FULL : along(VIRIDIS, depth / scale.blocks));
  }
}

/** Depth per token from what the page stores: base64 with 0 for "did not run", or one number for all; null stays. */
export function readDepth(stored, tokens) {
  if (stored === null) return null;
  if (typeof stored === "number") return new Int16Array(tokens).fill(stored);
  return Int16Array.from(atob(stored), (letter) => letter.charCodeAt(0) - 1);
}
