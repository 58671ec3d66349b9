"""A report as one image: parts of the time, throughput over batch, or parts of the memory.

Only this file imports matplotlib, which is of the extra `eval`.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foveate.bench.report import BenchReport, Case, Entry

_PARTS = {
    "latency": {
        "text": "#9aa5b1", "transformer": "#2f6f4f", "refiner": "#7fb69a", "decoder": "#d9a441", "rest": "#c9d1d9",
    },
    "memory": {"kv": "#9aa5b1", "caches": "#2f6f4f", "activations": "#d9a441"},
}  # fmt: skip
_LEGEND_SIZE = 8


def draw(report: BenchReport, path: Path) -> None:
    """Writes the plot of a latency, throughput or memory report; the ending of `path` decides the format."""
    num_bars = sum(len(case.entries) for case in report.cases)
    height = 1.6 + 0.45 * max(num_bars, 4)
    # Without a fixed salt, the same figures would give another file every time.
    with mpl.rc_context({"svg.hashsalt": "foveate"}):
        if report.kind == "throughput":
            figure = Figure(figsize=(6.4, 4.2))
            _throughput(figure.subplots(), report)
        elif report.kind == "latency":
            figure = Figure(figsize=(11, height))
            left, right = figure.subplots(1, 2)
            _bars(left, report, "ms", 1.0, "milliseconds, medians")
            _scales(right, report.cases[-1])
        else:
            figure = Figure(figsize=(7.5, height))
            _bars(figure.subplots(), report, "bytes", 1e6, "MB beside the weights, before decoding, medians")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _bars(axis: Axes, report: BenchReport, group: str, unit: float, label: str) -> None:
    """Stacked parts, one bar per size, batch and policy; a part that nothing took is left out."""
    entries = [(case, entry) for case in report.cases for entry in case.entries]
    names = [f"{entry.policy}\n{case.title}" for case, entry in entries]
    places = list(range(len(entries)))
    left = [0.0] * len(entries)
    for part, colour in _PARTS[report.kind].items():
        widths = [max(_median(entry, f"{group}.{part}"), 0.0) / unit for _, entry in entries]
        if not any(widths):
            continue
        axis.barh(places, widths, left=left, color=colour, label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axis.set_yticks(places, names, fontsize=_LEGEND_SIZE)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    _finish(axis)


def _scales(axis: Axes, case: Case) -> None:
    """Milliseconds per scale, one line per policy."""
    for entry in case.entries:
        axis.plot(
            [scale.scale for scale in entry.scales], [s.ms.median for s in entry.scales], "o-", ms=4, label=entry.policy
        )
    axis.set_xlabel(f"scale; {case.title}")
    axis.set_ylabel("milliseconds, medians")
    _finish(axis)


def _throughput(axis: Axes, report: BenchReport) -> None:
    """Images per second over batch, one line per size and policy."""
    lines: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for case in report.cases:
        size = f"{case.picture.width}x{case.picture.height}"
        for side, entry in enumerate(case.entries):
            rate = entry.numbers["images_per_s"]
            if rate is not None:
                lines.setdefault((size, side, entry.policy), []).append((case.batch, rate))
    for (size, _, policy), points in lines.items():
        batches, rates = zip(*sorted(points), strict=True)
        axis.plot(batches, rates, "o-", label=f"{policy}, {size}")
    sizes = sorted({case.batch for case in report.cases})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch")
    axis.set_ylabel("images per second, offline")
    _finish(axis)


def _median(entry: Entry, name: str) -> float:
    found = entry.figures.get(name)
    return 0.0 if found is None else found.median


def _finish(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=_LEGEND_SIZE, frameon=False)
