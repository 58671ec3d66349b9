"""What load on a server was like: percentiles of first partial image and completion, goodput, and ratios of sides.

A side is one kind of load; with several rounds the sides take turns, and every side has one phase in each round.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

from foveate.bench.load import NOT_SENT, PhaseRun, Shot
from foveate.bench.load_server import Sample
from foveate.bench.page import Table, markdown_table
from foveate.bench.rounds import Stop
from foveate.bench.spread import Spread, runs_for

PERCENTILES = (50, 95, 99)

_OK, _TOO_MANY = 200, 429
_RATIOS = (
    ("first_partial", "first_partial", "first_partial"),
    ("first_partial_of_completion", "first_partial", "completion"),
    ("completion", "completion", "completion"),
)
"""Names of ratios, and the medians of both sides that they divide."""
_ENDS = 0.2
"""Share of the samples at either end whose mean memory is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """All phases of all sides.

    Attributes:
        sides: One list of phases per side, round by round.
        goal_ms: A request that takes longer is no goodput; None counts every completed one.
        images: Of one request.
        facts: The command, the server, the machine and the settings, as plain data.
        stopped: Why phases are missing, if some are.
    """

    sides: tuple[tuple[PhaseRun, ...], ...]
    goal_ms: float | None
    images: int
    facts: dict[str, Any]
    stopped: Stop | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            **self.facts,
            "stopped": None if self.stopped is None else str(self.stopped),
            "sides": [
                {"name": runs[0].phase.name, "rounds": [summary(run, self.goal_ms) for run in runs]}
                for runs in self.sides
            ],
            "against_first": self.against_first(),
        }

    def against_first(self) -> list[dict[str, Any]]:
        """What each further side is against the first one, round by round: throughput, and when images come.

        `first_partial` is the median time to the first partial image over that of the first side,
        `first_partial_of_completion` the same time over the first side's median time to completion.
        """
        found = []
        for runs in self.sides[1:]:
            pairs = [
                (summary(run, self.goal_ms), summary(base, self.goal_ms))
                for run, base in zip(runs, self.sides[0], strict=False)
            ]
            ratios = {
                "images_per_s": [_over(own["images_per_s"], base["images_per_s"]) for own, base in pairs],
                "first_partial": [
                    _over(_p50(own, "first_partial"), _p50(base, "first_partial")) for own, base in pairs
                ],
                "first_partial_of_completion": [
                    _over(_p50(own, "first_partial"), _p50(base, "completion")) for own, base in pairs
                ],
                "completion": [_over(_p50(own, "completion"), _p50(base, "completion")) for own, base in pairs],
            }
            known = {name: [value for value in values if value is not None] for name, values in ratios.items()}
            found.append(
                {
                    "side": runs[0].phase.name,
                    "against": self.sides[0][0].phase.name,
                    **{name: Spread.of(values).to_json() if values else None for name, values in known.items()},
                }
            )
        return found


def summary(run: PhaseRun, goal_ms: float | None) -> dict[str, Any]:
    """One phase in numbers; what was due in its first tenth is left out of all but `requests`."""
    counted = [shot for shot in run.shots if run.settled_s <= shot.due_s <= run.end_s]
    done = [shot for shot in counted if is_complete(shot)]
    window = [shot for shot in run.shots if is_complete(shot) and run.settled_s <= shot.done_s <= run.end_s]
    good = [shot for shot in window if goal_ms is None or _ms(shot) <= goal_ms]
    seconds = max(run.end_s - run.settled_s, 1e-9)
    firsts = [1e3 * (shot.first_s - shot.due_s) for shot in done if shot.first_s is not None]
    return {
        "rate": run.phase.rate,
        "concurrency": run.phase.concurrency,
        "seconds": run.end_s,
        "requests": _requests(run.shots),
        "images_per_s": sum(shot.images for shot in window) / seconds,
        "goodput_per_s": sum(shot.images for shot in good) / seconds,
        "first_partial_ms": percentiles(firsts),
        "completion_ms": percentiles([_ms(shot) for shot in done]),
        "refusal_ms": percentiles([_ms(shot) for shot in counted if shot.status == _TOO_MANY]),
        "late_sending_ms": percentiles([1e3 * (shot.sent_s - shot.due_s) for shot in counted]),
        "client_cpu_share": run.client_cpu_share,
        "server": server_summary(run.samples, run.settled_s),
    }


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """The percentiles that so many values support, and how many they are."""
    found = {
        f"p{p}": float(np.percentile(np.asarray(values), p)) if len(values) >= runs_for(p) else None
        for p in PERCENTILES
    }
    return {**found, "n": len(values)}


def is_complete(shot: Shot) -> bool:
    """Whether all images of a request came."""
    return shot.status == _OK and shot.error is None


def server_summary(samples: Sequence[Sample], settled_s: float) -> dict[str, Any] | None:
    """What the server said of itself: its processors in use, the longest queue, and how its memory changed.

    Memory is the mean over the last fifth of the samples behind the warm-up, over that of the first fifth.
    """
    settled = [sample for sample in samples if sample.at_s >= settled_s]
    if not settled:
        return None
    memory = [sample.resident_bytes for sample in settled if sample.resident_bytes is not None]
    share = max(1, round(_ENDS * len(memory)))
    first, last = (fmean(part) if part else None for part in (memory[:share], memory[-share:]))
    spent = [(b.cpu_s - a.cpu_s) / (b.at_s - a.at_s) for a, b in pairwise(settled) if a.cpu_s and b.cpu_s]
    restarts = [sample.restarts for sample in samples if sample.restarts is not None]
    return {
        "samples": len(settled),
        "cores": fmean(spent) if spent else None,
        "queue_images_max": _most(samples, "queue_images"),
        "running_images_max": _most(samples, "running_images"),
        "open_files_max": _most(samples, "open_files"),
        "restarts": restarts[-1] - restarts[0] if restarts else None,
        "resident_bytes_max": _most(samples, "resident_bytes"),
        "resident_bytes_first": first,
        "resident_bytes_last": last,
        "resident_change": _over(last, first),
    }


def table(report: LoadReport) -> Table:
    """One row per side: medians over its rounds, requests of all of them."""
    columns = ("load", "images/s", "goodput/s", *(f"first p{p}" for p in PERCENTILES))
    columns += (*(f"done p{p}" for p in PERCENTILES), "completed", "refused", "failed", "client CPU")
    rows = []
    for runs in report.sides:
        found = [summary(run, report.goal_ms) for run in runs]
        timed = [
            _cell([one[name][f"p{p}"] for one in found], "{:.0f} ms")
            for name in ("first_partial_ms", "completion_ms")
            for p in PERCENTILES
        ]
        counts = (str(sum(one["requests"][name] for one in found)) for name in ("completed", "refused", "failed"))
        rates = (_cell([one[name] for one in found], "{:.3g}") for name in ("images_per_s", "goodput_per_s"))
        share = _cell([one["client_cpu_share"] for one in found], "{:.0%}")
        rows.append((runs[0].phase.name, *rates, *timed, *counts, share))
    return columns, rows


def notes(report: LoadReport) -> list[tuple[str, str]]:
    """What else is worth a line: ratios of the sides, and what the server said of itself."""
    lines = []
    for ratio in report.against_first():
        parts = [f"{_times(ratio['images_per_s'])} images/s", f"first partial {_times(ratio['first_partial'])}"]
        parts.append(f"{_times(ratio['first_partial_of_completion'])} of its time to completion")
        lines.append((f"{ratio['side']} against {ratio['against']}", ", ".join(parts)))
    for runs in report.sides:
        server = summary(runs[-1], report.goal_ms)["server"]
        if server is not None and server["resident_bytes_max"] is not None:
            change = "" if server["resident_change"] is None else f", memory x{server['resident_change']:.3f}"
            said = f"at most {server['queue_images_max']:.0f} images waited, {server['restarts']:.0f} restarts{change}"
            lines.append((f"server, {runs[-1].phase.name}", said))
    return lines


def markdown(report: LoadReport, plot: str) -> str:
    """The page, with a plot of that name beside it."""
    machine = report.facts["machine"]
    versions = [f"{name} {number}" for name, number in machine["versions"].items() if number is not None]
    lines = ["# foveate bench serve", "", "```text", report.facts["command"], "```", ""]
    lines += [f"- processor: {machine['cpu']['name']}, {machine['cpu']['cores']} cores"]
    ready = report.facts["server"]["ready"]
    model = f"{ready.get('model', 'unknown')}, kernels {ready.get('kernels', 'unknown')}"
    lines += [f"- versions: {', '.join(versions)}", f"- model of the server: {model}", ""]
    lines += [*markdown_table(table(report)), "", *(f"- {name}: {value}" for name, value in notes(report))]
    lines += ["", f"![load]({plot})", "", "How it was measured:", "", *(f"- {line}" for line in report.facts["method"])]
    return "\n".join(lines) + "\n"


def _requests(shots: Sequence[Shot]) -> dict[str, Any]:
    """How requests ended, those of the warm-up too."""
    failed = [shot for shot in shots if not is_complete(shot) and shot.status not in (_TOO_MANY, NOT_SENT)]
    return {
        "due": len(shots),
        "completed": sum(map(is_complete, shots)),
        "refused": sum(shot.status == _TOO_MANY for shot in shots),
        "not_sent": sum(shot.status == NOT_SENT for shot in shots),
        "failed": len(failed),
        "errors": dict(Counter(f"{shot.status} {shot.error}" for shot in failed)),
    }


def _ms(shot: Shot) -> float:
    return 1e3 * (shot.done_s - shot.due_s)


def _p50(found: dict[str, Any], what: str) -> float | None:
    value = found[f"{what}_ms"]["p50"]
    return None if value is None else float(value)


def _over(own: float | None, base: float | None) -> float | None:
    return None if own is None or not base else own / base


def _most(samples: Sequence[Sample], name: str) -> float | None:
    return max((value for sample in samples if (value := getattr(sample, name)) is not None), default=None)


def _cell(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(median(known)) if known else "-"


def _times(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f}x"
