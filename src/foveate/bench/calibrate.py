"""A profile of one machine, model and dtype: what scales took under several policies, and what their time is made of.

Figures of `sizes` are those of the full policy; the fit reads the scales of all policies (`pipeline.profile`).
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from foveate.bench.report import BenchReport, Case, Entry, ScaleFigures
from foveate.engine.report import Milliseconds
from foveate.pipeline.profile import Profile, features_of, fit

PROFILE_FORMAT = 2

CALIBRATION = (
    "full",
    "drop-branch:count=99",
    "random-tokens:keep_ratio=0.5,num_scales=5",
    "uniform-depth:keep_ratio=0.25,num_scales=5",
    "depthvar:reference_scale=-3",
    "random-tokens:keep_ratio=0.1,num_scales=5",
)
"""Policies whose scales tell tokens, blocks and FLOPs apart; the first one is the full run."""


def profile(report: BenchReport, weight_bytes_per_s: float) -> dict[str, Any]:
    """The profile as plain data.

    `ms_per_token_block` is a scale's median time over its tokens times blocks, all rows of the batch counted: what is
    around the blocks (sampling, embedding, the head; at scale 0 also what a call prepares once) is in it. It is None
    where a scale did not run.

    Args:
        report: A `calibrate` measurement.
        weight_bytes_per_s: What `peak.weight_bandwidth` measured in the same process.
    """
    data = report.to_json()
    kept = ("command", "machine", "model", "settings", "matmul_peak", "weights_bytes", "method", "excluded", "stopped")
    fitted = fit_profile(report.cases)
    return {
        "format": PROFILE_FORMAT,
        **{name: data[name] for name in kept},
        "weight_bytes_per_s": weight_bytes_per_s,
        "sizes": [_size(case) for case in report.cases],
        "fit": fitted.to_json(),
        "points": [
            {
                "policy": entry.policy,
                "width": case.picture.width,
                "height": case.picture.height,
                "batch": case.batch,
                "transformer_ms": entry.figures["ms.transformer"].median,
                "refiner_ms": entry.figures["ms.refiner"].median,
                "predicted_ms": _predicted(fitted, entry),
            }
            for case in report.cases
            for entry in case.entries
        ],
    }


def fit_profile(cases: Sequence[Case]) -> Profile:
    """What the time of a scale is made of, over all sizes, batches and policies.

    `headroom` is the median, over policies, of what nine of ten runs stayed below, over the prediction.
    """
    scales = [(_features(s), s.ms.median) for case in cases for entry in case.entries for s in entry.scales]
    ran = [(row, ms) for row, ms in scales if row[0]]
    plain = Profile(
        ms=fit([row for row, _ in ran], [ms for _, ms in ran]),
        decoder_ms=tuple(
            (case.picture.width * case.picture.height, case.entries[0].figures["ms.decoder"].median / case.batch)
            for case in cases
        ),
        rest_ms=max(case.entries[0].figures["ms.rest"].median for case in cases),
        headroom=1.0,
    )
    entries = [entry for case in cases for entry in case.entries]
    taken = [entry.figures["ms.transformer"].p90 + entry.figures["ms.refiner"].p90 for entry in entries]
    longer = [ms / _predicted(plain, entry) for ms, entry in zip(taken, entries, strict=True)]
    return replace(plain, headroom=max(1.0, median(longer)))


def _features(scale: ScaleFigures) -> list[float]:
    return features_of(scale.scale, blocks=scale.blocks, token_blocks=scale.token_blocks, flops=scale.flops)


def _predicted(profile: Profile, entry: Entry) -> float:
    """Milliseconds of all scales, a refiner's among them, as the fit has them, without headroom."""
    return sum(a * b for scale in entry.scales for a, b in zip(profile.ms, _features(scale), strict=True))


def _size(case: Case) -> dict[str, Any]:
    entry, picture = case.entries[0], case.picture
    return {
        "width": picture.width,
        "height": picture.height,
        "aspect_ratio": picture.aspect_ratio,
        "pixels": picture.pixels,
        "batch": case.batch,
        "rounds": case.rounds,
        "ms": {part: entry.figures[f"ms.{part}"].to_json() for part in Milliseconds.__slots__},
        "scales": [
            {**s.to_json(), "ms_per_token_block": s.ms.median / s.token_blocks if s.token_blocks else None}
            for s in entry.scales
        ],
    }
