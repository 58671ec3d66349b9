/** How near an image is to its full run, measured in the browser from the lossless files. */
import { psnr } from "./viz/maps.js";
import { urlOf } from "./urls.js";

const known = new Map();

/** PSNR in dB, 100 for equal images; null where one of them is missing or was stored with loss. */
export async function fidelity(run, reference) {
  if (reference === null || run.picture === null || run.id === reference.id) return null;
  if (run.picture.type !== "image/png" || reference.picture.type !== "image/png") return null;
  const pair = `${run.id} ${reference.id}`;
  if (!known.has(pair)) {
    const [one, other] = await Promise.all([pixelsOf(reference.picture), pixelsOf(run.picture)]);
    known.set(pair, one.data.length === other.data.length ? psnr(one, other) : null);
  }
  return known.get(pair);
}

async function pixelsOf(blob) {
  const image = new Image();
  image.src = urlOf(blob);
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
