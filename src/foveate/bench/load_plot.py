"""Load on a server as one image: how many requests were answered after how long, and what the server held over time.

Only this file and `plot.py` import matplotlib, which is of the extra `eval`.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foveate.bench.load import PhaseRun
from foveate.bench.load_report import LoadReport, is_complete

_COLOURS = ("#2f6f4f", "#d9a441", "#9a4d3f", "#5b7db1", "#7a5c99")
_LEGEND_SIZE = 8


def draw_load(report: LoadReport, path: Path) -> None:
    """Writes the plot; the ending of `path` decides the format."""
    with mpl.rc_context({"svg.hashsalt": "foveate"}):
        figure = Figure(figsize=(11, 6.4))
        (times, rates), (queue, memory) = figure.subplots(2, 2)
        for side, runs in enumerate(report.sides):
            colour = _COLOURS[side % len(_COLOURS)]
            _times(times, runs, colour)
            _rates(rates, runs[-1], colour)
            _samples(queue, runs[-1], "queue_images", 1.0, colour)
            _samples(memory, runs[-1], "resident_bytes", 1e6, colour)
        for axis, label in ((times, "share of completed requests"), (rates, "completed images per second")):
            axis.set_ylabel(label)
        for axis, label in ((queue, "images that wait"), (memory, "resident memory of the server, MB")):
            axis.set_ylabel(label)
        for axis in (times, rates, queue, memory):
            axis.set_xlabel("seconds")
            axis.set_ylim(bottom=0)
            for edge in ("top", "right"):
                axis.spines[edge].set_visible(False)
        times.set_xlabel("seconds; dashed: to the first partial image")
        times.set_xlim(left=0)
        times.legend(fontsize=_LEGEND_SIZE, frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _times(axis: Axes, runs: tuple[PhaseRun, ...], colour: str) -> None:
    """Shares of completed requests by time, all rounds together."""
    done = [shot for run in runs for shot in run.shots if is_complete(shot) and shot.due_s >= run.settled_s]
    whole = sorted(shot.done_s - shot.due_s for shot in done)
    first = sorted(shot.first_s - shot.due_s for shot in done if shot.first_s is not None)
    for values, style, label in ((whole, "-", runs[0].phase.name), (first, "--", None)):
        axis.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1), style, color=colour, label=label)


def _rates(axis: Axes, run: PhaseRun, colour: str) -> None:
    """Completed images per second, in 30 stretches of the phase."""
    done = [(shot.done_s, shot.images) for shot in run.shots if is_complete(shot) and shot.done_s <= run.end_s]
    edges = np.linspace(0, max(run.end_s, 1e-9), 31)
    counts, _ = np.histogram([at for at, _ in done], bins=edges, weights=[images for _, images in done])
    axis.plot((edges[:-1] + edges[1:]) / 2, counts / np.diff(edges), color=colour)


def _samples(axis: Axes, run: PhaseRun, name: str, unit: float, colour: str) -> None:
    """What the server said of itself, the last round of a side."""
    points = [(sample.at_s, value / unit) for sample in run.samples if (value := getattr(sample, name)) is not None]
    axis.plot([at for at, _ in points], [value for _, value in points], color=colour)
