"""Fills the HTML page with what a comparison measured."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from foveate.eval.controls import ANOTHER_SEED
from foveate.eval.fidelity import flip_maps
from foveate.eval.pairs import ERRORS, SCORES, FidelityReport
from foveate.eval.report import ComparisonReport, PolicyResult, ShownImage, Timing
from foveate.eval.statistics import ErrorSummary, Interval, Spread, Summary
from foveate.viz.metrics import Metric, judge_metrics
from foveate.viz.page_data import Figure, FrontierPoint, ImagePair, Lead, PageData, Role, ScaleTime


def page_data(
    report: ComparisonReport,
    command: str,
    lead: Lead | None = None,
    title: str | None = None,
    headline: str | None = None,
) -> PageData:
    """The page of a report.

    Args:
        report: What was measured.
        command: What to type to get this again.
        lead: What stands on top of the page.
        title: What is compared; None names the policy or counts several.
        headline: Spec of the policy whose figures stand first; None takes the first one.
    """
    several = len(report.policies)
    subject = title or (report.policy if several == 1 else f"{several} policies")
    config = report.config
    count = len(report.policies[0].rows)
    return PageData(
        title=f"{subject} against {report.against}",
        summary=f"{count} images of {config.get('model')}, {config.get('dtype')}, on {config.get('machine')}",
        points=tuple(_points(report)),
        headline=headline,
        pairs=tuple(shown_pair(result.policy, shown) for result in report.results() for shown in result.shown),
        scale_times=tuple(_scale_times(report)),
        facts=_facts(report),
        command=command,
        config=config,
        notes=tuple(notes(report)),
        lead=lead,
        num_pairs=sum(len(result.rows) for result in report.results()),
        metrics=judged_metrics(report.fidelity.judged),
    )


def judged_metrics(judged: Mapping[str, Summary | ErrorSummary]) -> dict[str, Metric]:
    """How figures of judges are printed."""
    return {
        metric.name: metric
        for name, summary in judged.items()
        for metric in judge_metrics(name, is_error=isinstance(summary, ErrorSummary)).values()
    }


def notes(report: ComparisonReport) -> Iterator[str]:
    """What a reader should know before trusting a figure, one line each."""
    if report.missing_prompts:
        yield f"interrupted: {report.missing_prompts} prompts are missing in every figure"
    elif report.is_interrupted:
        yield "interrupted: timed runs are missing in some figures"
    if report.sessions > 1:
        yield f"times come from {report.sessions} processes; ratios were formed within turns of one process each"
    for result in report.results():
        found = result.fidelity
        if found.constant_images:
            yield f"{result.policy}: {found.constant_images} of {found.num_images} images have one colour"
    constant = report.yardstick.constant_references
    if constant:
        yield f"{constant} references have one colour; their pairs are not scored"


def _points(report: ComparisonReport) -> Iterator[FrontierPoint]:
    for result in report.results():
        yield FrontierPoint(
            name=result.policy,
            role=result.role,
            series=result.policy.partition(":")[0] if "|" not in result.policy else result.policy,
            figures=_figures(result),
            details={"fingerprint": result.fingerprint},
        )
    judged = report.reference.judged
    names = set(report.fidelity.judged)
    own = {} if judged is None else {n: f for n, f in fidelity_figures(judged).items() if n.split(".")[0] in names}
    still = {f"speedup.{part}": Figure(value=1.0) for part in ("transformer", "end_to_end", "decoder")}
    flops = {"flops_ratio": Figure(value=report.reference.flops_ratio)}
    taken = {result.policy for result in report.results()}
    yield FrontierPoint(
        name=report.against if report.against not in taken else f"{report.against} (reference)",
        role=Role.REFERENCE,
        figures={**still, **flops, **_times(report.reference.timing), **own},
    )
    yield FrontierPoint(
        name=ANOTHER_SEED, role=Role.SEED, figures={**still, **flops, **fidelity_figures(report.yardstick)}
    )


def _figures(result: PolicyResult) -> dict[str, Figure]:
    ends = result.timing.intervals
    speeds = {
        f"speedup.{part}": _with_ends(spread.median, end)
        for (part, spread), end in zip(result.timing.speedups.items(), ends.values(), strict=True)
    }
    lead = result.figures().get("beats_controls_by_db")
    beaten = {} if lead is None or math.isinf(lead) else {"beats_controls_by_db": Figure(value=lead)}
    return {
        **speeds,
        "flops_ratio": Figure(value=result.flops_ratio),
        **_times(result.timing),
        **fidelity_figures(result.fidelity),
        **beaten,
        "runs": Figure(value=float(result.timing.runs)),
    }


def _times(timing: Timing) -> dict[str, Figure]:
    return {
        "transformer_ms.median": _spread(timing.transformer_ms),
        "latency_ms.median": _spread(timing.latency_ms),
    }


def _spread(found: Spread) -> Figure:
    return Figure(value=found.median, low=found.p10, high=found.p90)


def _with_ends(value: float, ends: Interval | None) -> Figure:
    return Figure(value=value) if ends is None else Figure(value=value, low=ends.low, high=ends.high)


def fidelity_figures(found: FidelityReport) -> dict[str, Figure]:
    """Figures of a fidelity report with their intervals, by dotted name."""
    figures: dict[str, Figure] = {}
    for name, summary in found.summaries().items():
        for part in type(summary).__slots__:
            ends = found.intervals[f"{name}.{part}"]
            figures[f"{name}.{part}"] = _with_ends(getattr(summary, part), ends)
    counts = {"identical": Figure(value=float(found.identical)), "n": Figure(value=float(found.num_images))}
    return {**figures, **counts}


def shown_pair(policy: str, shown: ShownImage) -> ImagePair:
    """An image for the page, of the point of this name."""
    scores = shown.row.scores
    values = {name: scores.value(name) for name in (*SCORES, *ERRORS, *scores.judged)}
    return ImagePair(
        policy=policy,
        prompt=shown.row.prompt,
        seed=shown.row.seed,
        reference=shown.reference,
        picture=shown.picture,
        figures={name: None if math.isnan(value) else value for name, value in values.items()},
        is_identical=scores.is_identical,
        flip=None if scores.is_identical else _flip(shown.picture, shown.reference),
        scales=shown.maps,
    )


def _flip(picture: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.asarray(flip_maps(picture[None], reference[None])[0])


def _scale_times(report: ComparisonReport) -> Iterator[ScaleTime]:
    taken = {result.policy for result in report.results()}
    name = report.against if report.against not in taken else f"{report.against} (reference)"
    sides = [(name, report.reference.timing), *((result.policy, result.timing) for result in report.results())]
    for policy, timing in sides:
        for scale, (grid, ms) in enumerate(timing.scales):
            yield ScaleTime(policy=policy, scale=scale, grid=grid, ms=_spread(ms))


def _facts(report: ComparisonReport) -> dict[str, str]:
    config = report.config
    weights: Mapping[str, Any] = config.get("weights", {})
    versions: Mapping[str, Any] = config.get("versions", {})
    facts = {
        "model": config.get("model"),
        "weights": f"{weights.get('kind')}, sha256 {weights.get('sha256')}",
        "size": f"{config.get('width')}x{config.get('height')}",
        "dtype": config.get("dtype"),
        "machine": config.get("machine"),
        "threads": config.get("threads"),
        "kernels": config.get("kernels"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}
