"""Statistics of what a comparison measured: summaries of per-image values, spreads, and bootstrap intervals.

Intervals resample whole prompts, as images of one prompt resemble each other. All figures of one comparison are
resampled with the same prompts, so differences between policies are paired by prompt and seed, and a second look at
the same values gives the same interval.

Axes: n images, prompt-major; p prompts, j images of one prompt, r resamples.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile intervals.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from foveate.core.errors import FoveateError

NUM_RESAMPLES = 2000
LEVEL = 0.95
"""Share of intervals that would hold the true value, two-sided."""

_SEED = 0
_CHUNK = 1 << 21
"""Values that are drawn at once."""
_PADDING = 4
"""Times as many values as there are that may be held to give all prompts equally many."""
_FEWEST = 2
"""Prompts of an interval."""

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
        if not np.isnan(values).any():
            return np.asarray(np.percentile(values, share, axis=-1))
        ordered = np.sort(values, axis=-1)  # NaN comes last.
        place = (np.isfinite(values).sum(axis=-1, keepdims=True) - 1) * (share / 100)
        below = np.floor(place).astype(np.int64)
        above = np.ceil(place).astype(np.int64)
        low, high = (np.take_along_axis(ordered, index, axis=-1) for index in (below, above))
        return np.asarray((low + (high - low) * (place - below))[..., 0])

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
    values: Sequence[float] | np.ndarray,
    num_prompts: int | Sequence[int] | np.ndarray,
    statistic: str = "mean",
    level: float = LEVEL,
) -> Interval | None:
    """A bootstrap interval of one statistic over per-image values; always the same one for the same values.

    Memory stays below a few times `_CHUNK` values or `_PADDING` times the values, whatever is more.

    Args:
        values: Prompt-major; NaN where an image could not be scored.
        num_prompts: How many prompts these are, with equally many images each, or how many images each prompt has.
        statistic: A name of `STATISTICS`.
        level: Confidence, in (0, 1), two-sided.

    Returns:
        Both ends; None where fewer than two prompts have a value, which says nothing about others.
    """
    values_n = np.asarray(values, dtype=np.float64).reshape(-1)
    if not isinstance(num_prompts, Sequence | np.ndarray):
        found_r = _resampled(values_n.reshape(num_prompts, -1), statistic)
    else:
        counts_p = np.asarray(num_prompts, dtype=np.int64)
        most = int(counts_p.max(initial=1))
        is_small = len(counts_p) * most <= _PADDING * len(values_n) + _CHUNK
        found_r = (_resampled_padded if is_small else _resampled_unequal)(values_n, counts_p, statistic)
    return None if found_r is None else _ends(found_r, level)


def _resampled_padded(
    values_n: Float64[np.ndarray, " n"], counts_p: Int[np.ndarray, " p"], statistic: str
) -> Float64[np.ndarray, " r"] | None:
    """The statistic of every resample, where NaN fills what prompts have less than the one with most images."""
    values_pj = np.full((len(counts_p), int(counts_p.max(initial=1))), np.nan)
    values_pj[np.arange(values_pj.shape[1]) < counts_p[:, None]] = values_n
    return _resampled(values_pj, statistic)


def _resampled(values_pj: Float64[np.ndarray, "p j"], statistic: str) -> Float64[np.ndarray, " r"] | None:
    """The statistic of every resample, where prompts have equally many images."""
    scored_pj = values_pj[np.isfinite(values_pj).any(axis=1)]
    if len(scored_pj) < _FEWEST:
        return None
    parts = []
    for drawn_rp in _resamples(len(scored_pj), max(1, _CHUNK // scored_pj.size)):
        parts.append(STATISTICS[statistic](scored_pj[drawn_rp].reshape(len(drawn_rp), -1)))
    return np.concatenate(parts)


def _resampled_unequal(
    values_n: Float64[np.ndarray, " n"], counts_p: Int[np.ndarray, " p"], statistic: str
) -> Float64[np.ndarray, " r"] | None:
    """The same, one resample at a time and without NaN: for prompts that differ too much."""
    is_scored_n = np.isfinite(values_n)
    prompt_n = np.repeat(np.arange(len(counts_p)), counts_p)
    left_p = np.bincount(prompt_n[is_scored_n], minlength=len(counts_p))
    left_p = left_p[left_p > 0]
    if len(left_p) < _FEWEST:
        return None
    scored_n = values_n[is_scored_n]
    first_p = np.cumsum(left_p) - left_p
    found = []
    for (drawn_p,) in _resamples(len(left_p), 1):
        length_p = left_p[drawn_p]
        place_n = np.arange(length_p.sum()) - np.repeat(np.cumsum(length_p) - length_p, length_p)
        found.append(STATISTICS[statistic](scored_n[np.repeat(first_p[drawn_p], length_p) + place_n]))
    return np.asarray(found)


def _ends(found_r: Float64[np.ndarray, " r"], level: float) -> Interval:
    rest = 50 * (1 - level)
    low, high = np.percentile(found_r, (rest, 100 - rest)).tolist()
    return Interval(low=low, high=high)


def _resamples(num_prompts: int, most: int) -> Iterator[Int[np.ndarray, "r p"]]:
    """Prompts drawn with replacement, up to `most` resamples at once; always the same ones, however many at once."""
    rng = np.random.default_rng(_SEED)
    for first in range(0, NUM_RESAMPLES, most):
        yield rng.integers(0, num_prompts, (min(most, NUM_RESAMPLES - first), num_prompts))


def _finite(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    if array.size == 0:
        raise FoveateError("a summary needs at least one value, got none")
    if not np.isfinite(array).all():
        raise FoveateError(f"a summary needs finite values, got {array[~np.isfinite(array)][0]}")
    return array
