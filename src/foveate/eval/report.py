"""What a comparison found, for programs and for people: figures, JSON, CSV, a table, and whether bounds hold."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.core.atomic import write_text
from foveate.core.errors import FoveateError
from foveate.eval.bounds import FIGURES, FigureBound
from foveate.eval.controls import Beat, beats_all_by
from foveate.eval.pairs import FidelityReport, PairScores
from foveate.eval.statistics import Interval, Spread
from foveate.viz.page_data import Lead, Role
from foveate.viz.scale_map import ScaleMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times faster than the reference: the median over all batches of prompts."""

    transformer: float
    decoder: float
    end_to_end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Measured times of one policy, over all batches of prompts.

    Attributes:
        speedup: Medians.
        speedups: With their spread, by `transformer`, `decoder` and `end_to_end`.
        intervals: Of the medians, by the same names; None where there are fewer than two batches.
        latency_ms: Of a whole call.
        transformer_ms: Of a call's transformer.
        scales: Grid and milliseconds of every scale.
        runs: Rounds over every batch.
    """

    speedup: Speedup
    speedups: Mapping[str, Spread]
    intervals: Mapping[str, Interval | None]
    latency_ms: Spread
    transformer_ms: Spread
    scales: tuple[tuple[tuple[int, int], Spread], ...]
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image of a policy, and its scores."""

    prompt: str
    seed: int
    scores: PairScores

    @property
    def psnr(self) -> float:
        """PSNR to the reference, dB."""
        return self.scores.psnr

    def to_json(self) -> dict[str, Any]:
        """Plain data; scores of judges beside the others."""
        scores = asdict(self.scores)
        judged = scores.pop("judged")
        return {"prompt": self.prompt, "seed": self.seed, **scores, **judged}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShownImage:
    """An image for the page, uint8 (height, width, 3), its reference, and what ran for it."""

    row: ImageRow
    picture: np.ndarray
    reference: np.ndarray
    maps: tuple[ScaleMap, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyResult:
    """What was measured of one policy.

    Attributes:
        policy: Spec.
        fingerprint: Of the policy.
        role: A policy in question, or a control.
        fidelity: To the reference.
        timing: Beside the reference.
        flops_ratio: Run over full.
        beats: The best setting of every control that is as fast; None where no controls were measured.
        rows: Every image.
        shown: The worst images, for the page.
    """

    policy: str
    fingerprint: str
    role: Role
    fidelity: FidelityReport
    timing: Timing
    flops_ratio: float
    beats: Mapping[str, Beat] | None
    rows: tuple[ImageRow, ...]
    shown: tuple[ShownImage, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data in the keys that every JSON output of this library uses."""
        found = self.fidelity.to_json()
        intervals = found.pop("intervals")
        speeds = {f"speedup.{part}": ends and [ends.low, ends.high] for part, ends in self.timing.intervals.items()}
        beaten: dict[str, Any] = {}
        if self.beats is not None:
            beaten["beats_controls_by_db"] = beats_all_by(list(self.beats.values()))
            beaten["beats"] = {name: beat.to_json() for name, beat in self.beats.items()}
        return {
            **found,
            "speedup": asdict(self.timing.speedup),
            "speedup_spread": {part: asdict(spread) for part, spread in self.timing.speedups.items()},
            "latency_ms": asdict(self.timing.latency_ms),
            "transformer_ms": asdict(self.timing.transformer_ms),
            "flops_ratio": self.flops_ratio,
            **beaten,
            "intervals": {**intervals, **speeds},
            "policy": self.policy,
            "fingerprint": self.fingerprint,
            "role": self.role.value,
            "runs": self.timing.runs,
            "images": [row.to_json() for row in self.rows],
        }

    def figures(self) -> dict[str, float]:
        """Every number that a bound can be about, by its dotted name; a lead over no rival is infinite."""
        data = self.to_json()
        found = dict(flat_figures({key: value for key, value in data.items() if key not in _NO_FIGURES}))
        for part, spread in data["speedup_spread"].items():
            found |= {f"speedup.{part}.p10": spread["p10"], f"speedup.{part}.p90": spread["p90"]}
        for name, ends in data["intervals"].items():
            if ends is not None:
                found |= {f"{name}.low": ends[0], f"{name}.high": ends[1]}
        if self.beats is not None:
            lead = data["beats_controls_by_db"]
            found["beats_controls_by_db"] = math.inf if lead is None else lead
        return found


_NO_FIGURES = (
    "speedup_spread",
    "intervals",
    "beats",
    "beats_controls_by_db",
    "images",
    "policy",
    "fingerprint",
    "role",
)


def flat_figures(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of plain data, by its dotted name."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from flat_figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """The policy that all others are compared with, and what a judge says of its own images."""

    policy: str
    timing: Timing
    flops_ratio: float
    judged: FidelityReport | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        judged = {} if self.judged is None else self.judged.to_json()
        names = () if self.judged is None else tuple(self.judged.judged)
        return {
            "policy": self.policy,
            "latency_ms": asdict(self.timing.latency_ms),
            "transformer_ms": asdict(self.timing.transformer_ms),
            "flops_ratio": self.flops_ratio,
            **{name: judged[name] for name in names},
            "intervals": {key: ends for key, ends in judged.get("intervals", {}).items() if key.split(".")[0] in names},
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparisonReport:
    """What a comparison found.

    Attributes:
        policies: Those in question, in the order given.
        controls: Trivial baselines, measured in the same turns.
        reference: What they are compared with.
        yardstick: The full run with another seed, beside the full run.
        config: How the images were generated.
        sessions: Processes that the times come from; 1 where nothing was resumed.
        missing_prompts: Prompts that an interruption left out; 0 in a complete report.
        is_interrupted: Whether Ctrl-C ended it early, maybe with all prompts but not all rounds.
    """

    policies: tuple[PolicyResult, ...]
    controls: tuple[PolicyResult, ...]
    reference: Reference
    yardstick: FidelityReport
    config: Mapping[str, Any]
    sessions: int
    missing_prompts: int
    is_interrupted: bool

    @property
    def policy(self) -> str:
        """Spec of the first policy."""
        return self.policies[0].policy

    @property
    def against(self) -> str:
        """Spec of the reference."""
        return self.reference.policy

    @property
    def fidelity(self) -> FidelityReport:
        """Of the first policy."""
        return self.policies[0].fidelity

    @property
    def speedup(self) -> Speedup:
        """Of the first policy."""
        return self.policies[0].timing.speedup

    @property
    def flops_ratio(self) -> float:
        """Of the first policy."""
        return self.policies[0].flops_ratio

    @property
    def yardstick_psnr(self) -> float:
        """Mean PSNR between two seeds of the full run, dB."""
        return self.yardstick.psnr.mean

    def results(self) -> tuple[PolicyResult, ...]:
        """Policies, then controls."""
        return (*self.policies, *self.controls)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the figures of a policy that is alone in question also stand on top."""
        entries = [result.to_json() for result in self.policies]
        return {
            **(entries[0] if len(entries) == 1 else {}),
            "n": len(self.policies[0].rows),
            "yardstick_psnr": self.yardstick_psnr,
            "against": self.against,
            "policies": entries,
            "controls": [result.to_json() for result in self.controls],
            "reference": self.reference.to_json(),
            "yardstick": self.yardstick.to_json(),
            "sessions": self.sessions,
            "missing_prompts": self.missing_prompts,
            "config": dict(self.config),
        }

    def figures(self, policy: str | None = None) -> dict[str, float]:
        """The figures of a policy by its spec, of the first one without it.

        Raises:
            FoveateError: There is no such policy here.
        """
        found = [result for result in self.results() if policy in (None, result.policy)]
        if not found:
            there = ", ".join(result.policy for result in self.results())
            raise FoveateError(f"no policy {policy!r} in this comparison; there are {there}")
        return {**found[0].figures(), "yardstick_psnr": self.yardstick_psnr}

    def check(self, bound: str) -> bool:
        """Whether a bound such as `ssim.p10 >= 0.88` holds for every policy in question, or for the one it names.

        Raises:
            FoveateError: The bound is not written as a bound, or there is no such figure or policy.
        """
        parsed = self._parsed(bound)
        return all(parsed.holds(self.figures(spec)) for spec in self.concerned(parsed))

    def holding(self, bound: FigureBound) -> tuple[tuple[str, float], ...]:
        """The policies that a bound holds for, and their figure."""
        found = [(spec, self.figures(spec)) for spec in self.concerned(bound)]
        return tuple((spec, bound.value(figures)) for spec, figures in found if bound.holds(figures))

    def concerned(self, bound: FigureBound) -> tuple[str, ...]:
        """Specs of the policies that a bound is about."""
        return tuple(result.policy for result in self.policies) if bound.policy is None else (bound.policy,)

    def _parsed(self, bound: str) -> FigureBound:
        names = {name: type(found).__slots__ for name, found in self.fidelity.judged.items()}
        return FigureBound.parse(bound, [f"{name}.{part}" for name, parts in names.items() for part in parts])

    def to_csv(self) -> str:
        """One line per policy and control, one column per figure; empty where a figure was not measured."""
        judged = [f"{name}.{part}" for name, s in self.fidelity.judged.items() for part in type(s).__slots__]
        ends = [f"{name}{end}" for name in self.policies[0].to_json()["intervals"] for end in (".low", ".high")]
        columns = [*FIGURES, *judged, *ends]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", "role", "fingerprint", *columns])
        for result in self.results():
            figures = self.figures(result.policy)
            values = ["" if name not in figures else f"{figures[name]:.10g}" for name in columns]
            writer.writerow([result.policy, result.role.value, result.fingerprint, *values])
        return file.getvalue()

    def page(
        self, command: str = "", lead: Lead | None = None, title: str | None = None, headline: str | None = None
    ) -> str:
        """The report as one self-contained HTML page.

        Args:
            command: What to type to get this again.
            lead: What stands on top of the page.
            title: What is compared; None names the policy or counts several.
            headline: Spec of the policy whose figures stand first; None takes the first one.
        """
        from foveate.eval.page import page_data  # noqa: PLC0415 - it reads this class
        from foveate.viz.page import render  # noqa: PLC0415

        return render(page_data(self, command, lead, title, headline))

    def to_html(self, path: str | Path, command: str = "") -> Path:
        """Writes the page; returns its path."""
        write_text(path, self.page(command))
        return Path(path)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows for people: policies, controls, the reference and another seed."""
        return table_of(self)


def table_of(report: ComparisonReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a report for people."""
    has_controls = any(result.beats is not None for result in report.policies)
    names = tuple(report.fidelity.judged)
    columns = ("policy", "speedup", "end to end", "FLOPs", "PSNR dB", "p10", "min", "foreground", "SSIM", "MS-SSIM",
               "FLIP", *names, "identical", *(("beats controls by",) if has_controls else ()))  # fmt: skip
    rows = []
    for result in report.results():
        last = (_lead(result),) if has_controls else ()
        speeds = result.timing.speedups
        rows.append((
            result.policy if result.role is Role.POLICY else f"({result.policy})",
            _times(speeds["transformer"]), _times(speeds["end_to_end"]), f"{result.flops_ratio:.1%}",
            *fidelity_cells(result.fidelity, names), *last,
        ))  # fmt: skip
    blank = ("",) if has_controls else ()
    judged = report.reference.judged
    cells = ["-"] * 7 + ["-" if judged is None else f"{judged.judged[name].mean:.3g}" for name in names]
    rows.append(
        (f"{report.against} (reference)", "1.00x", "1.00x", f"{report.reference.flops_ratio:.1%}", *cells, "-", *blank)
    )
    rows.append(("another seed", "-", "-", "100.0%", *fidelity_cells(report.yardstick, names), *blank))
    return columns, rows


def fidelity_cells(found: FidelityReport, names: Sequence[str]) -> tuple[str, ...]:
    """Cells of the columns from `PSNR dB` to `identical`, with judges by name."""
    mean = found.intervals["psnr.mean"]
    ends = "" if mean is None else f" ({mean.low:.1f}-{mean.high:.1f})"
    judged = [f"{found.judged[name].mean:.3g}" if name in found.judged else "-" for name in names]
    return (
        f"{found.psnr.mean:.1f}{ends}", f"{found.psnr.p10:.1f}", f"{found.psnr.min:.1f}",
        f"{found.foreground_psnr.mean:.1f}", f"{found.ssim.mean:.3f}",
        "-" if found.ms_ssim is None else f"{found.ms_ssim.mean:.3f}", f"{found.flip.mean:.3f}", *judged,
        f"{found.identical} of {found.num_images}",
    )  # fmt: skip


def _times(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({ratio.p10:.2f}-{ratio.p90:.2f})"


def _lead(result: PolicyResult) -> str:
    if result.role is not Role.POLICY or result.beats is None:
        return ""
    worst = min((b for b in result.beats.values() if b.by_db is not None), key=lambda b: b.by_db or 0.0, default=None)
    if worst is None or worst.by_db is None:
        return "no control is as fast"
    return f"{worst.by_db:+.1f} dB ({worst.setting})"
