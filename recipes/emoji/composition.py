"""Checks of composed images that need no judge: background colour, number, order, size and side of things.

Every check takes what any image of the kind must show, so it can be run on real composites too: what it says of
those is its ceiling. Axes: Y = X pixels; y = x pixels after shrinking to `_SIDE`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from foveate.core.errors import FoveateError
from recipes.emoji.colours import BACKGROUNDS, cielab

_SIDE = 128
_BORDER = 4
_CONTRAST = 16.0
"""CIELAB distance from the background at which a pixel belongs to a thing."""
_LEAST_AREA = 0.002
"""Of the image; what is smaller is a speck."""
_LEAST_SHARE = 0.25
"""Of the largest thing's area; what is smaller is a piece of another thing."""

_BIG, _SMALL = 0.55, 0.45
"""Shares of the image's side that a big thing reaches and a small one does not."""
_LEAST_SHIFT = 0.1
"""Of the image's side; what lies nearer to the middle is at no side."""

Axis = Literal["x", "y"]
Size = Literal["big", "small"]
Side = Literal["left", "right", "top", "bottom"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A connected region that stands out from the background.

    Attributes:
        centre: Its centroid (y, x), as shares of the image's side.
        area: Its pixels, as a share of the image.
        box: Top, left, bottom and right, as shares of the image's side.
    """

    centre: tuple[float, float]
    area: float
    box: tuple[float, float, float, float]


def background_of(image: UInt8[np.ndarray, "Y X 3"]) -> str:
    """Names the colour of `BACKGROUNDS` that is nearest to the median of the border, in CIELAB."""
    colours_Kc = cielab(np.array(list(BACKGROUNDS.values()), dtype=np.float64))
    distance_K = np.linalg.norm(colours_Kc - _border_colour(_shrink(image)), axis=-1)
    return list(BACKGROUNDS)[int(distance_K.argmin())]


def things_of(image: UInt8[np.ndarray, "Y X 3"]) -> list[Thing]:
    """Finds the things of an image, largest first; specks and loose pieces of a thing are left out."""
    seen_yxc = _shrink(image)
    is_thing_yx = np.linalg.norm(cielab(seen_yxc) - _border_colour(seen_yxc), axis=-1) > _CONTRAST
    label_yx = connected(is_thing_yx)
    found = []
    for label in np.unique(label_yx[label_yx > 0]):
        y, x = np.nonzero(label_yx == label)
        found.append(
            Thing(
                centre=(float(y.mean() + 0.5) / _SIDE, float(x.mean() + 0.5) / _SIDE),
                area=len(y) / _SIDE**2,
                box=(y.min() / _SIDE, x.min() / _SIDE, (y.max() + 1) / _SIDE, (x.max() + 1) / _SIDE),
            )
        )
    found.sort(key=lambda thing: -thing.area)
    return [one for one in found if one.area >= max(_LEAST_AREA, _LEAST_SHARE * found[0].area)]


def crop(image: UInt8[np.ndarray, "Y X 3"], thing: Thing) -> UInt8[np.ndarray, "e e 3"]:
    """Cuts out the square around a thing, a tenth wider than it; outside of the image is background."""
    side = image.shape[0]
    top, left, bottom, right = (round(edge * side) for edge in thing.box)
    extent = max(8, round(1.1 * max(bottom - top, right - left)))
    y, x = (top + bottom - extent) // 2, (left + right - extent) // 2
    cut = np.empty((extent, extent, 3), dtype=np.uint8)
    cut[:] = np.median(_border(image.astype(np.float64)), axis=0).round()
    inner = image[max(y, 0) : y + extent, max(x, 0) : x + extent]
    cut[max(-y, 0) : max(-y, 0) + inner.shape[0], max(-x, 0) : max(-x, 0) + inner.shape[1]] = inner
    return cut


def is_in_order(things: tuple[Thing, Thing], similarity_22: Float[np.ndarray, "2 2"], axis: Axis) -> bool:
    """Says whether the first name's thing comes before the second's, from the left or from above.

    Args:
        things: Two things.
        similarity_22: How well each thing (row) fits each of the two names (column); the better of the two ways to pair
            them decides which is which.
        axis: "x" for left of, "y" for above.
    """
    first, second = things if np.trace(similarity_22) >= np.trace(similarity_22[::-1]) else things[::-1]
    along = 1 if axis == "x" else 0
    return first.centre[along] < second.centre[along]


def size_of(image: UInt8[np.ndarray, "Y X 3"]) -> Size | None:
    """Says whether all things together are big or small, by the longer side of their box; None is neither, or empty."""
    box = _box(things_of(image))
    if box is None:
        return None
    top, left, bottom, right = box
    extent = max(bottom - top, right - left)
    if extent >= _BIG:
        return "big"
    return "small" if extent <= _SMALL else None


def side_of(image: UInt8[np.ndarray, "Y X 3"]) -> Side | None:
    """Says at which side all things together lie, by the middle of their box; None is the middle, or empty."""
    box = _box(things_of(image))
    if box is None:
        return None
    top, left, bottom, right = box
    return side_at(((top + bottom) / 2, (left + right) / 2))


def side_at(centre: tuple[float, float]) -> Side | None:
    """Names the side where a centre (y, x) lies, in shares of the image's side; None is about the middle."""
    y, x = centre[0] - 0.5, centre[1] - 0.5
    if max(abs(y), abs(x)) < _LEAST_SHIFT:
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def connected(is_thing_yx: Bool[np.ndarray, "y x"]) -> Int[np.ndarray, "y x"]:
    """Labels connected regions, neighbours above, below, left and right; 0 is none, other labels are arbitrary.

    Every pixel takes the largest label of its neighbours until nothing changes, a step per pixel of the longest path.
    """
    mask_11yx = torch.from_numpy(is_thing_yx)[None, None].double()
    label_11yx = torch.arange(1, is_thing_yx.size + 1, dtype=torch.float64).view_as(mask_11yx) * mask_11yx
    while True:
        spread_11yx = torch.maximum(_largest(label_11yx, (3, 1)), _largest(label_11yx, (1, 3))) * mask_11yx
        if torch.equal(spread_11yx, label_11yx):
            return label_11yx[0, 0].long().numpy()
        label_11yx = spread_11yx


def _box(things: list[Thing]) -> tuple[float, float, float, float] | None:
    if not things:
        return None
    top, left, bottom, right = zip(*(one.box for one in things), strict=True)
    return min(top), min(left), max(bottom), max(right)


def _largest(label_11yx: Tensor, window: tuple[int, int]) -> Tensor:
    return F.max_pool2d(label_11yx, window, stride=1, padding=(window[0] // 2, window[1] // 2))


def _shrink(image: UInt8[np.ndarray, "Y X 3"]) -> Float[np.ndarray, "y x 3"]:
    if image.shape[0] != image.shape[1] or image.shape[0] % _SIDE:
        raise FoveateError(f"composition is checked on squares of a multiple of {_SIDE} pixels, got {image.shape[:2]}")
    step = image.shape[0] // _SIDE
    return image.reshape(_SIDE, step, _SIDE, step, 3).mean((1, 3))


def _border(image: Float[np.ndarray, "Y X 3"]) -> Float[np.ndarray, "n 3"]:
    width = _BORDER * image.shape[0] // _SIDE
    inner = np.ones(image.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = False
    return image[inner]


def _border_colour(image: Float[np.ndarray, "Y X 3"]) -> Float[np.ndarray, " 3"]:
    return cielab(np.median(_border(image), axis=0))
