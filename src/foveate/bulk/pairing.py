"""Pairs the images of two runs by row id and image, in one pass over both manifests.

Before it, one pass over each finds the rows that both have: some 40 bytes a row while they are looked for, and 8 bytes
a row that both have afterwards. Those rows must come in the same order, as they do where both runs read one input.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int64

from foveate.bulk.output import OutputFolder
from foveate.core.errors import FoveateError

Entry = Mapping[str, Any]
SIDES = ("reference", "other")


@dataclass(kw_only=True, slots=True)
class Counts:
    """What came of pairing; it is filled while pairs are taken.

    Attributes:
        rows: Rows that both runs have.
        only: Rows that one run has and the other has not, by `SIDES`.
        failed: Failures of those rows that both have, by `SIDES`.
        unpaired: Images whose partner is missing or failed, by `SIDES`.
        pairs: Pairs that can be compared.
        other_prompts: Pairs with different prompts, which are left out.
        other_sizes: Pairs with different sizes, which are left out.
        other_seeds: Pairs with different seeds, which are compared.
    """

    rows: int = 0
    only: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    unpaired: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    pairs: int = 0
    other_prompts: int = 0
    other_sizes: int = 0
    other_seeds: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two entries of one image; `is_first` where no earlier pair is of the same row."""

    reference: Entry
    other: Entry
    is_first: bool


class Pairing:
    """The pairs of two runs.

    Attributes:
        counts: Complete when all pairs were taken.
    """

    def __init__(self, reference: OutputFolder, other: OutputFolder) -> None:
        """Finds the rows that both runs have.

        Raises:
            FoveateError: A manifest cannot be read.
        """
        self._runs = (reference, other)
        hashes = _hashes(reference), _hashes(other)
        self._common = _common(*hashes)
        num_common = len(self._common)
        only = {side: len(found) - num_common for side, found in zip(SIDES, hashes, strict=True)}
        self.counts = Counts(rows=num_common, only=only)

    def pairs(self) -> Iterator[Pair]:
        """Every pair that can be compared, in the order of rows.

        Raises:
            FoveateError: The rows are in another order, or a manifest cannot be read.
        """
        rows = (self._rows(run) for run in self._runs)
        for reference, other in zip(*rows, strict=True):
            if reference[0]["id"] != other[0]["id"]:
                raise FoveateError(
                    f"the runs have their rows in another order: {reference[0]['id']!r} of {self._runs[0].path} stands "
                    f"where {self._runs[1].path} has {other[0]['id']!r}; make both from one input"
                )
            yield from self._row(reference, other)

    def _row(self, reference: list[Entry], other: list[Entry]) -> Iterator[Pair]:
        counts, images = self.counts, []
        for side, entries in zip(SIDES, (reference, other), strict=True):
            images.append({entry["image"]: entry for entry in entries if "error" not in entry})
            counts.failed[side] += len(entries) - len(images[-1])
        both = [image for image in images[0] if image in images[1]]
        for side, found in zip(SIDES, images, strict=True):
            counts.unpaired[side] += len(found) - len(both)
        is_first = True
        for image in both:
            pair = Pair(reference=images[0][image], other=images[1][image], is_first=is_first)
            if self._can_compare(pair):
                is_first = False
                yield pair

    def _can_compare(self, pair: Pair) -> bool:
        counts, one, other = self.counts, pair.reference, pair.other
        if one["prompt"] != other["prompt"]:
            counts.other_prompts += 1
            return False
        if (one["width"], one["height"]) != (other["width"], other["height"]):
            counts.other_sizes += 1
            return False
        counts.other_seeds += one["seed"] != other["seed"]
        counts.pairs += 1
        return True

    def _rows(self, run: OutputFolder) -> Iterator[list[Entry]]:
        """The entries of every row that both runs have."""
        for entries in _by_row(run):
            place = int(np.searchsorted(self._common, hash(entries[0]["id"])))
            if place < len(self._common) and self._common[place] == hash(entries[0]["id"]):
                yield entries


def _hashes(run: OutputFolder) -> Int64[np.ndarray, " n"]:
    """One number for the id of every row."""
    found = array("q", (hash(entries[0]["id"]) for entries in _by_row(run)))
    return np.frombuffer(found, dtype=np.int64) if found else np.empty(0, dtype=np.int64)


def _common(one: Int64[np.ndarray, " n"], other: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " k"]:
    """Numbers that are in both, in order; both are sorted in place."""
    one.sort()
    other.sort()
    if not len(other):
        return other
    place = np.minimum(np.searchsorted(other, one), len(other) - 1)
    return one[other[place] == one]


def _by_row(run: OutputFolder) -> Iterator[list[Entry]]:
    for _, entries in groupby(run.entries(), key=lambda entry: entry["row"]):
        yield list(entries)
