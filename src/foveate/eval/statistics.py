"""Statistics of what a comparison measured: summaries of per-image values, spreads, and bootstrap intervals.

Intervals resample whole prompts, as images of one prompt resemble each other. All figures of one comparison are
resampled with the same prompts, so differences between policies are paired by prompt and seed, and a second look at
the same values gives the same interval.

Axes: n images, prompt-major; p prompts, j images of one prompt, r resamples.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile intervals.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from foveate.core.errors import FoveateError

NUM_RESAMPLES = 2000
LEVEL = 0.95
"""Share of intervals that would hold the true value, two-sided."""

_SEED = 0

Statistic = Callable[[np.ndarray], np.ndarray]
"""Of the values along the last axis; NaN stands for an image that could not be scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Per-image values of which more is better: mean and the worse end.

    Attributes:
        mean: Arithmetic mean.
        p10: Tenth percentile, linear between the two nearest values.
        min: Smallest value.
    """

    mean: float
    p10: float
    min: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorSummary:
    """Per-image values of which less is better: mean and the worse end.

    Attributes:
        mean: Arithmetic mean.
        p90: 90th percentile, linear between the two nearest values.
        max: Largest value.
    """

    mean: float
    p90: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median, tenth and 90th percentile of values that were measured several times, linear between values."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Where a figure lies with the level's confidence, both ends included."""

    low: float
    high: float


def _percentile(share: float) -> Statistic:
    """A percentile, linear between values; NumPy's that leaves NaN out takes a hundred times as long."""

    def found(values: np.ndarray) -> np.ndarray:
        take = np.nanpercentile if np.isnan(values).any() else np.percentile
        return np.asarray(take(values, share, axis=-1))

    return found


def _mean(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.nanmean(values, axis=-1))


STATISTICS: Mapping[str, Statistic] = {
    "mean": _mean,
    "median": _percentile(50.0),
    "p10": _percentile(10.0),
    "p90": _percentile(90.0),
    "min": functools.partial(np.nanmin, axis=-1),
    "max": functools.partial(np.nanmax, axis=-1),
}
"""By name; each leaves NaN out."""


def summarise(values: Iterable[float]) -> Summary:
    """Mean, tenth percentile and minimum of per-image values.

    Raises:
        FoveateError: There is no value, or one that is not finite.
    """
    array = _finite(values)
    return Summary(
        mean=float(array.mean()), p10=float(np.percentile(array, 10, method="linear")), min=float(array.min())
    )


def summarise_errors(values: Iterable[float]) -> ErrorSummary:
    """Mean, 90th percentile and maximum of per-image values.

    Raises:
        FoveateError: As `summarise`.
    """
    array = _finite(values)
    return ErrorSummary(
        mean=float(array.mean()), p90=float(np.percentile(array, 90, method="linear")), max=float(array.max())
    )


def spread(values: Iterable[float]) -> Spread:
    """Median, tenth and 90th percentile.

    Raises:
        FoveateError: As `summarise`.
    """
    p10, median, p90 = np.percentile(_finite(values), (10, 50, 90), method="linear").tolist()
    return Spread(median=median, p10=p10, p90=p90)


def interval(
    values: Sequence[float] | np.ndarray, num_prompts: int, statistic: str = "mean", level: float = LEVEL
) -> Interval | None:
    """A bootstrap interval of one statistic over per-image values; always the same one for the same values.

    Args:
        values: Prompt-major, equally many of every prompt; NaN where an image could not be scored.
        num_prompts: How many prompts these are.
        statistic: A name of `STATISTICS`.
        level: Confidence, in (0, 1), two-sided.

    Returns:
        Both ends; None where fewer than two prompts have a value, which says nothing about others.
    """
    values_pj = np.asarray(values, dtype=np.float64).reshape(num_prompts, -1)
    scored_pj = values_pj[np.isfinite(values_pj).any(axis=1)]
    if len(scored_pj) < 2:  # noqa: PLR2004 - said in the docstring
        return None
    drawn_rn = scored_pj[_resamples(len(scored_pj))].reshape(NUM_RESAMPLES, -1)
    return _ends(STATISTICS[statistic](drawn_rn), level)


def _ends(found_r: Float64[np.ndarray, " r"], level: float) -> Interval:
    rest = 50 * (1 - level)
    low, high = np.percentile(found_r, (rest, 100 - rest)).tolist()
    return Interval(low=low, high=high)


@functools.lru_cache(maxsize=8)
def _resamples(num_prompts: int) -> Int[np.ndarray, "r p"]:
    """Prompts drawn with replacement, from a generator that is seeded the same every time."""
    return np.random.default_rng(_SEED).integers(0, num_prompts, (NUM_RESAMPLES, num_prompts))


def _finite(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise FoveateError("a summary needs at least one value, got none")
    if not np.isfinite(array).all():
        raise FoveateError(f"a summary needs finite values, got {array[~np.isfinite(array)][0]}")
    return array
