"""Memorisation: similarity of images to the drawings that a model was trained on.

An image is looked up by the cosine of its features, and held against the drawing found, pixel by pixel, at a size
where fine texture no longer counts. The yardstick is real art under the same look-up: how near a drawing comes to the
nearest *other* one.

Axes: n images, c drawings, F features, Y = X pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from foveate.core.errors import FoveateError
from foveate.eval.fidelity import psnr
from recipes.emoji.quality import unit_rows

THUMBNAIL = 64
COPY_DB = 20.0
"""From this PSNR at `THUMBNAIL` pixels on an image counts as a copy: an error of a tenth of the range, RMS."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Neighbours:
    """The nearest training drawing of each image.

    Attributes:
        index: Its row.
        cosine: Cosine of the features of both, in [-1, 1].
    """

    index: Int[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]


def nearest_neighbours(
    features_nF: Float[np.ndarray, "n F"],
    drawings_cF: Float[np.ndarray, "c F"],
    own_n: Int[np.ndarray, " n"] | None = None,
) -> Neighbours:
    """Finds the nearest drawing of each image by cosine.

    Args:
        features_nF: Of the images.
        drawings_cF: Of the drawings.
        own_n: Row that each image must not find, as it is that drawing itself; None excludes nothing.

    Raises:
        FoveateError: If no drawing is left to find.
    """
    if len(drawings_cF) < 1 + (own_n is not None):
        raise FoveateError(f"a nearest drawing needs one to find, got {len(drawings_cF)} drawings")
    cosine_nc = unit_rows(features_nF) @ unit_rows(drawings_cF).T
    if own_n is not None:
        cosine_nc[np.arange(len(own_n)), own_n] = -np.inf
    index = cosine_nc.argmax(1)
    return Neighbours(index=index, cosine=cosine_nc[np.arange(len(index)), index])


def thumbnail_psnr(
    images: UInt8[np.ndarray, "n Y X 3"], drawings: UInt8[np.ndarray, "n V U 3"]
) -> Float[np.ndarray, " n"]:
    """PSNR of each image to its drawing, in dB, both averaged down to `THUMBNAIL` pixels a side.

    Raises:
        FoveateError: If they do not pair up, or torchmetrics is missing.
    """
    return psnr(_thumbnails(images), _thumbnails(drawings))


def copied_share(psnr_n: Float[np.ndarray, " n"]) -> float:
    """Share of the images that reach `COPY_DB`."""
    return float((psnr_n >= COPY_DB).mean())


def _thumbnails(images: UInt8[np.ndarray, "n Y X 3"]) -> UInt8[np.ndarray, "n 64 64 3"]:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(pixels, (THUMBNAIL, THUMBNAIL), mode="area")
    return small.round().byte().permute(0, 2, 3, 1).contiguous().numpy()
