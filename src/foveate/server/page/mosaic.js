/** What stands where no image is yet: a square of cells that get finer towards its centre, as sight does. */
import { draw } from "./viz/dom.js";

const SIDE = 64;
const CENTRE = [0.5 * SIDE, 0.47 * SIDE];

/** An ornament; it says nothing to a screen reader. */
export function mosaic() {
  const svg = draw("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, class: "sv-mosaic", "aria-hidden": "true" });
  cells(0, 0, SIDE, svg);
  return svg;
}

function cells(x, y, side, svg) {
  const distance = Math.hypot(x + side / 2 - CENTRE[0], y + side / 2 - CENTRE[1]);
  if (side > 16 || (side > 1 && distance < 2.3 * side)) {
    const half = side / 2;
    for (const [dx, dy] of [
      [0, 0],
      [half, 0],
      [0, half],
      [half, half],
    ])
      cells(x + dx, y + dy, half, svg);
    return;
  }
  const level = Math.round(4 - Math.log2(side));
  const gap = Math.min(0.35, 0.09 * side);
  svg.append(
    draw("rect", {
      x: x + gap / 2,
      y: y + gap / 2,
      width: side - gap,
      height: side - gap,
      rx: gap,
      class: `sv-cell-${level}`,
    }),
  );
}
