"""What a scale takes on this machine, from its FLOPs: a constant, which a batch shares, and a rate, which it does not.

Measured on scales that ran alone, first by the warm-up, then all the time; before that taken from the profile of
`foveate bench calibrate` where there is one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEAST_GAIN = 1.1
"""How much more two scales must get done side by side than in turns to be packed."""
_POINTS = 64
"""Scales that the fit looks back on."""


@dataclass(kw_only=True)
class Rates:
    """Milliseconds of a scale: `fixed_ms + ms_per_gflop * GFLOPs`; None of either until something was measured."""

    fixed_ms: float | None = None
    ms_per_gflop: float | None = None
    _points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_POINTS))

    def note(self, flops: float, ms: float) -> None:
        """A scale that ran alone."""
        if flops > 0 and ms > 0:
            self._points.append((flops / 1e9, ms))

    def fit(self, points: Sequence[tuple[float, float]] | None = None) -> None:
        """Fits both numbers by least squares of the relative error, neither below zero.

        Args:
            points: GFLOPs and milliseconds; those that were noted if None.
        """
        rows = np.asarray(points if points is not None else self._points, dtype=np.float64).reshape(-1, 2)
        if len(rows) < 2 or np.ptp(rows[:, 0]) == 0:  # noqa: PLR2004 - a line needs two points
            return
        gflops, ms = rows[:, 0], rows[:, 1]
        weights = np.stack((1 / ms, gflops / ms), axis=1)
        fixed, rate = np.linalg.lstsq(weights, np.ones(len(rows)), rcond=None)[0]
        if fixed < 0:
            fixed, rate = 0.0, float(np.sum(gflops / ms) / np.sum((gflops / ms) ** 2))
        if rate < 0:
            fixed, rate = float(np.sum(1 / ms) / np.sum((1 / ms) ** 2)), 0.0
        self.fixed_ms, self.ms_per_gflop = float(fixed), float(rate)

    def ms(self, flops: float) -> float:
        """What a scale takes by itself; 0 where nothing was measured."""
        return (self.fixed_ms or 0.0) + (self.ms_per_gflop or 0.0) * flops / 1e9

    def is_small(self, flops: float) -> bool:
        """Whether two such scales are done at least `LEAST_GAIN` times as fast in one batch as in turns.

        In turns they take 2 (fixed + own), in a batch fixed + 2 own. Where nothing was measured every scale is small.
        """
        if self.fixed_ms is None or self.ms_per_gflop is None:
            return True
        own_ms = self.ms_per_gflop * flops / 1e9
        return 2 * (self.fixed_ms + own_ms) >= LEAST_GAIN * (self.fixed_ms + 2 * own_ms)
