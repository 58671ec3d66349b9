"""The images of a page: which pairs it holds, worst first, and their files as data URIs, each stored once.

Axes: Y pixel rows, X columns.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from foveate.viz.metrics import METRICS, metric
from foveate.viz.page_data import ImagePair

FLIP_QUALITY = 85
"""Of the lossy encoding of FLIP maps, which are looked at and not computed with."""

FIRST = 8
"""Pairs of every policy that a page takes in before anything else."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredPair:
    """A pair, and where its images are among the stored ones."""

    pair: ImagePair
    reference: int
    picture: int
    flip: int | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredImages:
    """What a page holds: data URIs, and the pairs that refer to them."""

    uris: tuple[str, ...]
    pairs: tuple[StoredPair, ...]


class _Store:
    """Data URIs by the bytes of what they show, so that equal images take their place once."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.num_bytes = 0
        self._places: dict[bytes, int] = {}

    def add(self, pixels: np.ndarray, *, is_lossless: bool) -> int:
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        if digest not in self._places:
            uri = data_uri(pixels, is_lossless=is_lossless)
            self._places[digest] = len(self.uris)
            self.num_bytes += len(uri)
            self.uris.append(uri)
        return self._places[digest]


def data_uri(pixels: UInt8[np.ndarray, "..."], *, is_lossless: bool) -> str:
    """A WebP file of RGB or grey pixels."""
    buffer = io.BytesIO()
    # 13 ms for 256 x 256; the default effort takes five times as long for files that are 7 % smaller.
    quality = 20 if is_lossless else FLIP_QUALITY
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=is_lossless, quality=quality, method=1)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def pair_metrics(pairs: Sequence[ImagePair]) -> list[str]:
    """Names of the figures that any pair has, in the order of `METRICS`; the first one sorts."""
    found = dict.fromkeys(name for pair in pairs for name in pair.figures)
    return [name for name in METRICS if name in found] + [name for name in found if name not in METRICS]


def worst_first(pairs: Sequence[ImagePair]) -> list[ImagePair]:
    """Pairs in the order in which a page takes them in.

    First the worst of every policy in turns, up to `FIRST` of each, then what other policies made of the same prompts,
    then the rest. What could not be measured counts as worst.
    """
    names = pair_metrics(pairs)
    by_policy: dict[str, list[ImagePair]] = {}
    for pair in pairs:
        by_policy.setdefault(pair.policy, []).append(pair)

    def badness(pair: ImagePair) -> float:
        value = pair.figures.get(names[0]) if names else None
        if value is None or not math.isfinite(value):
            return -math.inf
        return float(value) if metric(names[0]).is_high_good else -float(value)

    ranked = [sorted(of_one, key=badness) for of_one in by_policy.values()]
    first, rest = _in_turns([one[:FIRST] for one in ranked]), _in_turns([one[FIRST:] for one in ranked])
    met = {(pair.prompt, pair.seed) for pair in first}
    return first + sorted(rest, key=lambda pair: (pair.prompt, pair.seed) not in met)


def _in_turns(lists: Sequence[Sequence[ImagePair]]) -> list[ImagePair]:
    """The first of every list, then every second, and so on."""
    return [pair for pair in chain.from_iterable(zip_longest(*lists)) if pair is not None]


def store(pairs: Sequence[ImagePair], max_bytes: int) -> StoredImages:
    """Encodes pairs, worst first, until one more would take the page beyond its size; at least one is kept."""
    kept = _Store()
    stored: list[StoredPair] = []
    for pair in worst_first(pairs):
        before = len(kept.uris)
        stored.append(
            StoredPair(
                pair=pair,
                reference=kept.add(pair.reference, is_lossless=True),
                picture=kept.add(pair.picture, is_lossless=True),
                flip=None if pair.flip is None else kept.add(_grey(pair.flip), is_lossless=False),
            )
        )
        if kept.num_bytes > max_bytes and len(stored) > 1:
            return StoredImages(uris=tuple(kept.uris[:before]), pairs=tuple(stored[:-1]))
    return StoredImages(uris=tuple(kept.uris), pairs=tuple(stored))


def _grey(flip: Float[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "Y X"]:
    """A map in [0, 1] in 255 steps; NaN is drawn as no difference."""
    return np.round(255 * np.clip(np.nan_to_num(flip), 0, 1)).astype(np.uint8)
