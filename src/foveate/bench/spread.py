"""A figure that was measured several times: its median and spread, and the percentiles that the count supports."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 90, 99)
"""Of single-stream latency."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, 10th and 90th percentile, linear between values; with few values the outer ones are near the ends."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        p10, median, p90 = np.percentile(np.asarray(values, dtype=np.float64), (10, 50, 90)).tolist()
        return cls(median=median, p10=p10, p90=p90)

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {"median": self.median, "p10": self.p10, "p90": self.p90}


def runs_for(percentile: int) -> int:
    """Runs that a percentile needs, so that one of them may lie beyond it: 2 for p50, 10 for p90, 100 for p99."""
    return -(-100 // (100 - percentile))


def supported_percentiles(values: Sequence[float]) -> dict[int, float | None]:
    """The percentiles of `PERCENTILES`; None where there are too few values to say one."""
    array = np.asarray(values, dtype=np.float64)
    return {p: float(np.percentile(array, p)) if len(values) >= runs_for(p) else None for p in PERCENTILES}
