"""What figures are called on the page, in which unit and with how many digits, and which axis they may be."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum


class Axis(StrEnum):
    """The side of the frontier that a figure may stand on."""

    COST = "cost"
    FIDELITY = "fidelity"
    NONE = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How a figure is printed.

    Attributes:
        name: Dotted, as in JSON.
        label: In the table and on the axes.
        unit: Behind the number, with its blank if it needs one.
        digits: Behind the point; None prints four significant ones.
        axis: Of the frontier.
        is_high_good: Whether more is better.
        factor: From the stored number to the printed one: 100 for shares.
        is_against_reference: Whether it compares images with the reference's, so that it says nothing about that one.
        ceiling: The plot draws larger values at its edge: equal images would press all others into a corner.
    """

    name: str
    label: str
    unit: str = ""
    digits: int | None = 2
    axis: Axis = Axis.NONE
    is_high_good: bool = True
    factor: float = 1.0
    is_against_reference: bool = False
    ceiling: float | None = None

    def print(self, value: int | float | None) -> str:
        """With its unit; "n/a" for what is no number."""
        if value is None or not math.isfinite(value):
            return "n/a"
        return self._number(value) + self.unit

    def print_interval(self, low: int | float | None, high: int | float | None) -> str:
        """Both ends with the unit behind them; nothing where an end is missing."""
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            return ""
        return f"{self._number(low)}\u2013{self.print(high)}"

    def _number(self, value: float) -> str:
        form = ".4g" if self.digits is None else f".{self.digits}f"
        return format(self.factor * value, form)


_COST, _FIDELITY = Axis.COST, Axis.FIDELITY
_STATISTICS = {"mean": "mean", "p10": "10th percentile", "p90": "90th percentile", "min": "worst", "max": "worst"}
_PSNR_CEILING = 50.0
_DISTRIBUTIONS = (
    Metric(name="psnr", label="PSNR", unit=" dB", digits=1, axis=_FIDELITY, is_against_reference=True,
           ceiling=_PSNR_CEILING),
    Metric(name="foreground_psnr", label="foreground PSNR", unit=" dB", digits=1, axis=_FIDELITY,
           is_against_reference=True, ceiling=_PSNR_CEILING),
    Metric(name="ssim", label="SSIM", digits=3, axis=_FIDELITY, is_against_reference=True),
    Metric(name="ms_ssim", label="MS-SSIM", digits=3, axis=_FIDELITY, is_against_reference=True),
    Metric(name="flip", label="FLIP", digits=3, axis=_FIDELITY, is_high_good=False, is_against_reference=True),
    Metric(name="feature_distance", label="feature distance", digits=3, axis=_FIDELITY, is_high_good=False,
           is_against_reference=True),
    Metric(name="text_match", label="text match", unit=" %", digits=1, axis=_FIDELITY, factor=100.0),
)  # fmt: skip
_SINGLE = (
    Metric(name="speedup.transformer", label="speedup, transformer", unit="x", axis=_COST),
    Metric(name="speedup.end_to_end", label="speedup, end to end", unit="x", axis=_COST),
    Metric(name="speedup.decoder", label="speedup, decoder", unit="x"),
    Metric(name="transformer_ms.median", label="transformer time", unit=" ms", digits=0, axis=_COST,
           is_high_good=False),
    Metric(name="latency_ms.median", label="time of a call", unit=" ms", digits=0, axis=_COST, is_high_good=False),
    Metric(name="flops_ratio", label="FLOPs", unit=" %", digits=1, axis=_COST, is_high_good=False, factor=100.0),
    Metric(name="token_blocks_ratio", label="token-blocks", unit=" %", digits=1, axis=_COST, is_high_good=False,
           factor=100.0),
    Metric(name="peak_kv_bytes", label="peak K/V", unit=" MB", digits=1, is_high_good=False, factor=1e-6),
)  # fmt: skip
_LAST = (
    Metric(name="yardstick_psnr", label="PSNR of another seed", unit=" dB", digits=1),
    Metric(name="identical", label="identical images", digits=0),
    Metric(name="n", label="images", digits=0),
    Metric(name="runs", label="timed runs", digits=0),
)


def _distributed(of: Metric) -> tuple[Metric, ...]:
    """A metric of single images, and its statistics over many."""
    return (of, *(replace(of, name=f"{of.name}.{s}", label=f"{of.label}, {text}") for s, text in _STATISTICS.items()))


METRICS = {
    metric.name: metric
    for metric in (*_SINGLE, *(one for name in _DISTRIBUTIONS for one in _distributed(name)), *_LAST)
}
"""Known figures by dotted name, in the order of the table."""


def judge_metrics(name: str, *, is_error: bool) -> dict[str, Metric]:
    """What a judge's figures are called, by dotted name."""
    of = Metric(name=name, label=name.replace("_", " "), digits=None, axis=_FIDELITY, is_high_good=not is_error)
    return {one.name: one for one in _distributed(of)}


PLAIN = Metric(name="", label="", digits=None)
"""Prints numbers that nothing is known about."""

TILES = (
    "speedup.transformer", "speedup.end_to_end", "flops_ratio", "psnr.mean", "ssim.mean", "flip.mean",
    "text_match.mean", "identical",
)  # fmt: skip
"""What stands large on top, where it was measured."""


def metric(name: str) -> Metric:
    """The known metric, or one that prints the name as its label."""
    return METRICS.get(name) or Metric(name=name, label=name.replace("_", " "), digits=None)
