"""The fidelity of a set of images to their references: every score of every pair, and what they come to.

A constant image is no picture. A pair whose reference is constant is counted and not scored; a constant image beside a
reference that is not keeps its scores, which are poor, and is counted.

Axes: n images, Y pixel rows, X columns.
"""

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, UInt8

from foveate.core.errors import FoveateError
from foveate.eval.fidelity import WHITE, flip_maps, foreground_psnr, ms_ssim, psnr, ssim
from foveate.eval.judges import Judge
from foveate.eval.statistics import LEVEL, ErrorSummary, Interval, Summary, interval, summarise, summarise_errors
from foveate.eval.structure import SMALLEST_SIDE

SCORES = ("psnr", "foreground_psnr", "ssim", "ms_ssim")
"""Of which more is better."""
ERRORS = ("flip",)
"""Of which less is better."""
_FLAGS = ("is_identical", "is_constant", "is_reference_constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """One image beside its reference.

    Attributes:
        psnr: Over all pixels, dB, at most 100.
        foreground_psnr: Over the pixels that are not background in both, dB, at most 100.
        ssim: Structural similarity, at most 1.
        ms_ssim: Multi-scale structural similarity, in [0, 1]; None for images under 176 pixels.
        flip: Mean of the FLIP map, in [0, 1]; 0 is no difference.
        is_identical: Whether the bytes are equal.
        is_constant: Whether the image has one colour.
        is_reference_constant: Whether the reference has.
        judged: Scores of the judges, by their names.
    """

    psnr: float
    foreground_psnr: float
    ssim: float
    ms_ssim: float | None
    flip: float
    is_identical: bool
    is_constant: bool
    is_reference_constant: bool
    judged: dict[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """A score by its name; NaN where there is none."""
        found = self.judged[name] if name in self.judged else getattr(self, name)
        return float("nan") if found is None or self.is_reference_constant else float(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityReport:
    """Fidelity of a set of images to their references.

    Attributes:
        num_images: Number of pairs.
        psnr: PSNR over all pixels, dB.
        ssim: Structural similarity, at most 1.
        foreground_psnr: PSNR over the pixels that are not background, dB.
        ms_ssim: Multi-scale structural similarity; None for images under 176 pixels.
        flip: FLIP error, 0 for no difference.
        identical: Number of pairs with equal bytes that are pictures.
        constant_images: Images of one colour.
        constant_references: References of one colour; their pairs are not scored.
        judged: What the judges say, by their names.
        intervals: Confidence of each figure, by names such as `psnr.mean`; None where fewer than two prompts count.
    """

    num_images: int
    psnr: Summary
    ssim: Summary
    foreground_psnr: Summary
    ms_ssim: Summary | None
    flip: ErrorSummary
    identical: int
    constant_images: int
    constant_references: int
    judged: Mapping[str, Summary | ErrorSummary]
    intervals: Mapping[str, Interval | None]

    def summaries(self) -> dict[str, Summary | ErrorSummary]:
        """What was scored, by name."""
        multi = {} if self.ms_ssim is None else {"ms_ssim": self.ms_ssim}
        own = {"psnr": self.psnr, "ssim": self.ssim, "foreground_psnr": self.foreground_psnr, **multi}
        return {**own, "flip": self.flip, **self.judged}

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data, in the keys that every JSON output of this library uses."""
        ends = {name: found and [found.low, found.high] for name, found in self.intervals.items()}
        return {
            "n": self.num_images,
            **{name: dataclasses.asdict(found) for name, found in self.summaries().items()},
            "identical": self.identical,
            "constant": {"images": self.constant_images, "references": self.constant_references},
            "intervals": ends,
        }


def score_pairs(
    images: UInt8[np.ndarray, "n Y X 3"],
    references: UInt8[np.ndarray, "n Y X 3"],
    prompts: Sequence[str] = (),
    judges: Sequence[Judge] = (),
    background: tuple[int, int, int] = WHITE,
) -> tuple[PairScores, ...]:
    """Scores every image.

    Args:
        images: Images to judge, at least 11 pixels high and wide.
        references: One for each image, in the same order.
        prompts: One for each image, for the judges.
        judges: Who else scores.
        background: RGB of the flat background, for the foreground PSNR.

    Raises:
        FoveateError: The arrays do not pair up, a judge does not give one finite value per image, or a package of the
            extra `eval` is missing.
    """
    flat, flat_reference = _is_constant(images), _is_constant(references)
    is_large = min(images.shape[1:3]) >= SMALLEST_SIDE
    columns: dict[str, list[Any]] = {
        "psnr": psnr(images, references).tolist(),
        "foreground_psnr": foreground_psnr(images, references, background).tolist(),
        "ssim": ssim(images, references).tolist(),
        "ms_ssim": ms_ssim(images, references).tolist() if is_large else [None] * len(images),
        "flip": flip_maps(images, references).mean(axis=(1, 2), dtype=np.float64).tolist(),
        "is_identical": (images == references).all(axis=(1, 2, 3)).tolist(),
        "is_constant": flat.tolist(),
        "is_reference_constant": flat_reference.tolist(),
    }
    judged = judge_scores(images, references, prompts, judges)
    return tuple(
        PairScores(
            **{name: values[i] for name, values in columns.items()},
            judged={name: values[i] for name, values in judged.items()},
        )
        for i in range(len(images))
    )


class PairColumns:
    """Scores of many pairs, by column: 43 bytes a pair and 8 more for every judge, whatever their number."""

    def __init__(self, pairs: Iterable[PairScores] = ()) -> None:
        """Takes the first pairs; all of them have the same judges."""
        self._values: dict[str, array[float]] = {name: array("d") for name in (*SCORES, *ERRORS)}
        self._flags: dict[str, array[int]] = {name: array("b") for name in _FLAGS}
        self.extend(pairs)

    def __len__(self) -> int:
        # What is appended last: a pair that Ctrl-C cut does not count.
        return len(self._flags[_FLAGS[-1]])

    def extend(self, pairs: Iterable[PairScores]) -> None:
        """Adds pairs behind those that are there."""
        for pair in pairs:
            if not len(self):
                self._values |= {name: array("d") for name in pair.judged}
            for name, values in self._values.items():
                values.append(pair.value(name))
            for name, flags in self._flags.items():
                flags.append(getattr(pair, name))

    def keep(self, number: int) -> None:
        """Leaves out all pairs behind the first so many."""
        for values in self._values.values():
            del values[number:]
        for flags in self._flags.values():
            del flags[number:]

    def names(self) -> list[str]:
        """Scores that some pair has."""
        return [name for name in self._values if np.isfinite(self.values(name)).any()]

    def values(self, name: str) -> Float64[np.ndarray, " n"]:
        """A score of every pair; NaN where there is none."""
        return np.asarray(self._values[name], dtype=np.float64)

    def flags(self, name: str) -> Bool[np.ndarray, " n"]:
        """A yes or no of every pair, such as `is_identical`."""
        return np.asarray(self._flags[name], dtype=np.bool_)


def fidelity(
    pairs: Sequence[PairScores] | PairColumns,
    num_prompts: int | Sequence[int] | np.ndarray,
    errors: Iterable[str] = (),
    level: float = LEVEL,
) -> FidelityReport:
    """What the scores of a set of pairs come to.

    Args:
        pairs: Prompt-major.
        num_prompts: How many prompts these are, with equally many pairs each, or how many pairs each prompt has.
        errors: Names of judges of which less is better.
        level: Confidence of the intervals, in (0, 1).

    Raises:
        FoveateError: There is no pair, or no reference that is a picture.
    """
    columns = pairs if isinstance(pairs, PairColumns) else PairColumns(pairs)
    is_scored = ~columns.flags("is_reference_constant")
    if not is_scored.any():
        raise FoveateError(f"no pair can be scored: {len(columns)} references, and all of them have one colour")
    lower = {*ERRORS, *errors}
    found: dict[str, Summary | ErrorSummary] = {}
    intervals: dict[str, Interval | None] = {}
    for name in columns.names():
        values = columns.values(name)
        finite = values[~np.isnan(values)]
        summary = summarise_errors(finite) if name in lower else summarise(finite)
        found[name] = summary
        for part in type(summary).__slots__:
            intervals[f"{name}.{part}"] = interval(values, num_prompts, part, level)
    own: dict[str, Any] = {name: found.pop(name, None) for name in (*SCORES, *ERRORS)}
    return FidelityReport(
        num_images=len(columns),
        **own,
        identical=int(columns.flags("is_identical")[is_scored].sum()),
        constant_images=int(columns.flags("is_constant").sum()),
        constant_references=len(columns) - int(is_scored.sum()),
        judged=found,
        intervals=intervals,
    )


def fidelity_report(
    images: UInt8[np.ndarray, "n Y X 3"],
    references: UInt8[np.ndarray, "n Y X 3"],
    background: tuple[int, int, int] = WHITE,
) -> FidelityReport:
    """Compares a set of images, each of its own prompt, with their references.

    Args:
        images: Images to judge.
        references: One for each image, in the same order.
        background: RGB of the flat background, for the foreground PSNR.

    Raises:
        FoveateError: As `score_pairs` and `fidelity`.
    """
    return fidelity(score_pairs(images, references, background=background), len(images))


def _is_constant(images: UInt8[np.ndarray, "n Y X 3"]) -> np.ndarray:
    return np.asarray((images == images[:, :1, :1]).all(axis=(1, 2, 3)))


def judge_scores(
    images: UInt8[np.ndarray, "n Y X 3"],
    references: UInt8[np.ndarray, "n Y X 3"],
    prompts: Sequence[str],
    judges: Sequence[Judge],
) -> dict[str, list[float]]:
    """What judges say of every image, by their names.

    Raises:
        FoveateError: A judge does not give one finite value per image.
    """
    return {judge.name: _judged(judge, images, references, prompts) for judge in judges}


def _judged(judge: Judge, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> list[float]:
    values = np.asarray(judge.score(images, references, prompts), dtype=np.float64)
    if values.shape != (len(images),) or not np.isfinite(values).all():
        raise FoveateError(f"the judge {judge.name} must give one finite value for each of {len(images)} images")
    return [float(value) for value in values]
