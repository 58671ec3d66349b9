"""What a tuning found: its trials, what held-out prompts said of the best ones, and the winner as a policy file."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foveate.core.atomic import write_text
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.eval.bounds import FigureBound
from foveate.eval.report import ComparisonReport, PolicyResult
from foveate.eval.study import Trial
from foveate.viz.page_data import Chart, ChartPoint, ChartSeries, Figure, Lead, Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is sought.

    Attributes:
        figure: What shall be small or large.
        is_maximised: Whether it shall be large.
        bounds: What has to hold.
    """

    figure: str
    is_maximised: bool
    bounds: tuple[FigureBound, ...]

    def __post_init__(self) -> None:
        if not self.bounds:
            raise FoveateError('tune needs a bound, such as "psnr.p10 >= 27"; without one the fastest setting is plain')
        for bound in self.bounds:
            if bound.policy is not None:
                raise FoveateError(f"{bound.text}: the bound is about the setting that is sought; leave out the policy")
            if bound.comparison == "==":
                raise FoveateError(f"{bound.text}: a bound to tune to is an inequality, such as >=")
            if bound.figure == "beats_controls_by_db":
                raise FoveateError(f"{bound.text}: trials run without controls; bound psnr.mean instead")
            name, _, end = bound.figure.rpartition(".")
            if end in ("low", "high"):
                raise FoveateError(f"{bound.text}: an interval decides anyway; bound {name} itself, such as p10 or p90")
            if end in ("min", "max"):
                raise FoveateError(
                    f"{bound.text}: no sample bounds the worst image; bound {name}.{'p10' if end == 'min' else 'p90'}"
                )

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is nearer to the goal."""
        return value > other if self.is_maximised else value < other

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        word = "maximize" if self.is_maximised else "minimize"
        return {word: self.figure, "subject_to": [bound.text for bound in self.bounds]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A setting on held-out prompts.

    Attributes:
        policy: Spec.
        value: Of the figure that is sought.
        ends: The pessimistic end of every bounded figure, by the bound's text.
        unproved: Bounds whose figure stands as it was measured: times and counts have no interval here.
        holds: Whether all bounds hold there.
    """

    policy: str
    value: float
    ends: Mapping[str, float]
    unproved: tuple[str, ...]
    holds: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TuneReport:
    """What a tuning found.

    Attributes:
        base: Spec that the fields were changed in.
        goal: What was sought.
        trials: Every setting that was tried on the tuning prompts.
        candidates: The best ones, on held-out prompts, the best first.
        winner: The best candidate whose bounds hold; None where none does.
        held_out: The candidates' comparison; None where no trial held the bounds.
        confidence: Of every interval that decided.
        num_tuning: Tuning prompts.
        config: How the images were generated.
    """

    base: str
    goal: Goal
    trials: tuple[Trial, ...]
    candidates: tuple[Candidate, ...]
    winner: Policy | None
    held_out: ComparisonReport | None
    confidence: float
    num_tuning: int
    config: Mapping[str, Any]

    def provenance(self, command: str = "") -> dict[str, Any]:
        """Where the winner comes from, as plain data.

        Raises:
            FoveateError: There is no winner.
        """
        result, candidate = self._winning()
        assert self.held_out is not None, "a winner was measured"
        figures = self.held_out.figures(result.policy)
        bounded = [bound.figure.removesuffix(".low").removesuffix(".high") for bound in self.goal.bounds]
        names = dict.fromkeys([*bounded, self.goal.figure, "psnr.mean", "psnr.p10", "ssim.mean", "speedup.transformer",
                               "speedup.end_to_end", "flops_ratio"])  # fmt: skip
        texts = [bound.text for bound in self.goal.bounds]
        weights = self.config.get("weights", {})
        return {
            "summary": f"{self.base} tuned to {', '.join(texts)}",
            "bound": texts[0] if len(texts) == 1 else texts,
            "model": self.config.get("model"),
            "sha256": weights.get("sha256"),
            "command": command,
            "machine": self.config.get("machine"),
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "n": figures["n"] if not figures["n"].is_integer() else int(figures["n"]),
            "confidence": round(self.confidence, 4),
            "lower_bound": {
                text: float(f"{end:.6g}") for text, end in candidate.ends.items() if text not in candidate.unproved
            },
            "measured": {name: float(f"{figures[name]:.6g}") for name in names if name in figures},
            "yardstick_psnr": float(f"{self.held_out.yardstick_psnr:.6g}"),
        }

    def yaml(self, command: str = "") -> str:
        """The winner as a policy file with its provenance, which `load_policy` reads.

        Raises:
            FoveateError: There is no winner.
        """
        self._winning()
        assert self.winner is not None, "checked above"
        parts = [part.stored() for part in self.winner.parts_of()]
        origin = {"provenance": self.provenance(command)}
        data: Any = {**parts[0], **origin} if len(parts) == 1 else [*parts, origin]
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))

    def to_yaml(self, path: str | Path, command: str = "") -> Path:
        """Writes the winner; returns the path.

        Raises:
            FoveateError: There is no winner.
        """
        write_text(path, self.yaml(command))
        return Path(path)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        held_out = None if self.held_out is None else self.held_out.to_json()
        return {
            "tune": {
                "policy": self.base,
                **self.goal.to_json(),
                "num_tuning_prompts": self.num_tuning,
                "confidence": self.confidence,
                "trials": [trial.to_json() for trial in self.trials],
                "candidates": [
                    {
                        "policy": c.policy,
                        "value": c.value,
                        "ends": dict(c.ends),
                        "unproved": list(c.unproved),
                        "holds": c.holds,
                    }
                    for c in self.candidates
                ],
            },
            "winner": None
            if self.winner is None
            else {"spec": self.winner.spec, "fingerprint": self.winner.fingerprint},
            "held_out": held_out,
        }

    def page(self, command: str = "") -> str:
        """The held-out comparison as one self-contained HTML page, the trials on top.

        Raises:
            FoveateError: No trial held the bounds, so there is nothing to compare.
        """
        if self.held_out is None:
            raise FoveateError("no trial held the bounds on the tuning prompts, so there is no comparison to show")
        winner = None if self.winner is None else self.winner.spec
        return self.held_out.page(command, _lead(self, command), f"{self.base} tuned", winner)

    def _winning(self) -> tuple[PolicyResult, Candidate]:
        if self.winner is None or self.held_out is None:
            raise FoveateError(self.verdict())
        spec = self.winner.spec
        result = next(result for result in self.held_out.policies if result.policy == spec)
        return result, next(candidate for candidate in self.candidates if candidate.policy == spec)

    def verdict(self) -> str:
        """What came out, in a line."""
        bounds = ", ".join(bound.text for bound in self.goal.bounds)
        if self.winner is not None:
            found = next(c for c in self.candidates if c.policy == self.winner.spec)
            return f"{found.policy} holds {bounds} on held-out prompts: {self._ends(found)}"
        if not self.candidates:
            count = len(self.trials)
            return f"none of {count} trials holds {bounds} on the tuning prompts; widen the ranges or loosen the bound"
        nearest = self.candidates[0]
        return (
            f"no setting holds {bounds} on held-out prompts with {self.confidence:.1%} confidence; "
            f"{nearest.policy} has {self._ends(nearest)}: loosen the bound or give more prompts"
        )

    def _ends(self, candidate: Candidate) -> str:
        pairs = zip(self.goal.bounds, candidate.ends.values(), strict=True)
        return ", ".join(f"{bound.figure} {_word(bound, candidate)} {end:.4g}" for bound, end in pairs)


def _word(bound: FigureBound, candidate: Candidate) -> str:
    if bound.text in candidate.unproved:
        return "measured, not proved:"
    return "at least" if bound.comparison in (">", ">=") else "at most"


def _lead(report: TuneReport, command: str) -> Lead:
    """The top of the page: the verdict, every trial, and the winner's file."""
    rows = tuple(
        (
            index,
            ", ".join(f"{name}={value}" for name, value in trial.values.items()),
            trial.value if trial.refusal is None else trial.refusal,
            "yes" if trial.is_feasible else "no",
            *(trial.figures.get(bound.figure) for bound in report.goal.bounds),
        )
        for index, trial in enumerate(report.trials)
    )
    bounded = tuple(bound.figure for bound in report.goal.bounds)
    columns = ("trial", "setting", report.goal.figure, "holds the bounds", *bounded)
    table = Table(caption=f"Trials on {report.num_tuning} tuning prompts", columns=columns, rows=rows)
    files = {} if report.winner is None else {"tuned.yaml": report.yaml(command)}
    return Lead(heading="Tuning", text=report.verdict(), charts=_charts(report), tables=(table,), files=files)


def _charts(report: TuneReport) -> tuple[Chart, ...]:
    """The search over its trials, and every bounded figure beside its bound."""
    ran = [(float(index), trial) for index, trial in enumerate(report.trials) if trial.value is not None]
    best: list[ChartPoint] = []
    for index, trial in ran:
        value = trial.value or 0.0
        if trial.is_feasible and (not best or report.goal.is_better(value, best[-1].y.value or 0.0)):
            best.append(ChartPoint(x=index, y=Figure(value=value), label=trial.policy))
    tried = tuple(
        ChartPoint(x=index, y=Figure(value=trial.value), label=trial.policy, is_faint=not trial.is_feasible)
        for index, trial in ran
    )
    series = (
        ChartSeries(name="trials", points=tried),
        ChartSeries(name="best so far", points=tuple(best), is_line=True, is_step=True),
    )
    search = Chart(caption="The search", x_label="trial", y_label=report.goal.figure, series=series)
    return (search, *(_bound_chart(ran, report.goal.figure, bound) for bound in report.goal.bounds))


def _bound_chart(ran: Sequence[tuple[float, Trial]], figure: str, bound: FigureBound) -> Chart:
    points = tuple(
        ChartPoint(
            x=trial.value or 0.0,
            y=Figure(value=trial.figures.get(bound.figure)),
            label=trial.policy,
            is_faint=not trial.is_feasible,
        )
        for _, trial in ran
    )
    return Chart(
        caption=bound.text,
        x_label=figure,
        y_label=bound.figure,
        series=(ChartSeries(name="trials", points=points),),
        limit=bound.limit,
    )
