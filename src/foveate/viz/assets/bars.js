/**
 * <foveate-bars>: grouped bars with intervals, one group per scale.
 *
 *   bars.figure = { label: "Time per scale", unit: " ms", groups: ["0", "1"], titles: ["scale 0, 1 x 1", ...],
 *                   series: [{ name, tone, values: [[value, low, high], ...] }] };
 */
import { draw } from "./dom.js";
import { ticks } from "./plot.js";

const BAR_MARGIN = { top: 14, right: 8, bottom: 44, left: 52 };

export class FoveateBars extends HTMLElement {
  #figure = null;
  #width = 0;
  #observer = null;

  connectedCallback() {
    this.#observer = new ResizeObserver(() => {
      if (Math.abs(this.clientWidth - this.#width) > 1) this.#draw();
    });
    this.#observer.observe(this);
    this.#draw();
  }

  disconnectedCallback() {
    this.#observer.disconnect();
  }

  set figure(figure) {
    this.#figure = figure;
    this.#draw();
  }

  #draw() {
    this.#width = this.clientWidth;
    if (this.#figure === null || !this.isConnected || this.#width < 60) return;
    const { series, groups, label, unit } = this.#figure;
    const height = Math.round(Math.min(Math.max((this.#figure.aspect ?? 0.36) * this.#width, 230), 320));
    const most = Math.max(...series.flatMap((one) => one.values.flat()).filter(Number.isFinite), 1e-9);
    const bottom = height - BAR_MARGIN.bottom;
    const y = (value) => bottom - (value / (1.04 * most)) * (bottom - BAR_MARGIN.top);
    const svg = draw("svg", {
      viewBox: `0 0 ${this.#width} ${height}`,
      width: this.#width,
      height,
      role: "img",
      "aria-label": label,
    });
    const axis = draw("g", { class: "fv-axis" });
    for (const tick of ticks(0, most, 4)) {
      axis.append(
        draw("line", { x1: BAR_MARGIN.left, x2: this.#width - BAR_MARGIN.right, y1: y(tick.value), y2: y(tick.value) }),
      );
      axis.append(
        draw("text", { x: BAR_MARGIN.left - 8, y: y(tick.value) + 4, "text-anchor": "end" }, tick.text + unit),
      );
    }
    svg.append(axis);
    const step = (this.#width - BAR_MARGIN.left - BAR_MARGIN.right) / Math.max(1, groups.length);
    groups.forEach((name, group) => this.#group(svg, axis, { name, group, step, y, bottom }));
    axis.append(
      draw(
        "text",
        {
          class: "fv-axis-name",
          x: (BAR_MARGIN.left + this.#width) / 2,
          y: height - 6,
          "text-anchor": "middle",
        },
        "scale",
      ),
    );
    this.replaceChildren(svg);
  }

  #group(svg, axis, { name, group, step, y, bottom }) {
    const { series, titles, unit } = this.#figure;
    const width = Math.min(26, (0.78 * step) / series.length);
    const left = BAR_MARGIN.left + (group + 0.5) * step - (width * series.length) / 2;
    axis.append(
      draw("text", { x: BAR_MARGIN.left + (group + 0.5) * step, y: bottom + 17, "text-anchor": "middle" }, name),
    );
    series.forEach((one, place) => {
      const [value, low, high] = one.values[group] ?? [null, null, null];
      if (!Number.isFinite(value)) return;
      const x = left + place * width;
      const said = `${one.name}, ${titles[group]}: ${value.toPrecision(3)}${unit}`;
      svg.append(
        draw(
          "rect",
          {
            class: `fv-bar fv-tone-${one.tone}`,
            x: x + 0.5,
            y: y(value),
            width: Math.max(1, width - 1),
            height: Math.max(0, bottom - y(value)),
            rx: Math.min(2, width / 4),
          },
          draw("title", {}, said),
        ),
      );
      if (Number.isFinite(low) && Number.isFinite(high) && width > 5) {
        const middle = x + width / 2;
        svg.append(draw("path", { class: "fv-whisker fv-tone-ink", d: `M${middle} ${y(low)}V${y(high)}` }));
      }
    });
  }
}

customElements.define("foveate-bars", FoveateBars);
