"""Bit usage of a binary tokenizer: which bits vary, and their entropy, everywhere and where images are flat.

A bit that is always the same carries nothing, yet costs the transformer a prediction at every token. What bits are
worth less on flat areas than on textured ones is what the methods can save.

Axes: s scales, Z bits of a code, n images, (h, w) the grid of a scale.

Source: the entropy of a single bit, H(p) = -p log2 p - (1 - p) log2(1 - p), Shannon 1948. It is an upper bound, as bits
that follow from each other are counted as if they did not.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch.nn.functional import adaptive_max_pool2d

from foveate.core.errors import FoveateError

RARE = 0.02
"""A bit is in use if it is 1 in more than this share of all tokens, and in less than one minus it."""

FLAT_RANGE = 4
"""A token stands for a flat area if its pixels differ by at most this much of 255 in every channel."""


def bit_means(bits: Sequence[Bool[np.ndarray, "n _h _w Z"]]) -> Float[np.ndarray, "s Z"]:
    """Returns the share of tokens in which each bit is 1, per scale.

    Args:
        bits: The bits of every scale.

    Raises:
        FoveateError: If there is no scale, or one without tokens.
    """
    if not bits or any(scale.size == 0 for scale in bits):
        raise FoveateError(f"bit usage needs tokens at every scale, got the shapes {[scale.shape for scale in bits]}")
    return np.stack([scale.mean((0, 1, 2), dtype=np.float64) for scale in bits])


def bits_in_use(means_sZ: Float[np.ndarray, "s Z"]) -> Float[np.ndarray, " s"]:
    """Returns the share of the bits of each scale whose mean lies in (`RARE`, 1 - `RARE`), ends excluded."""
    return np.asarray(((means_sZ > RARE) & (means_sZ < 1 - RARE)).mean(1))


def bit_entropy(means_sZ: Float[np.ndarray, "s Z"]) -> Float[np.ndarray, " s"]:
    """Returns the mean entropy per bit of each scale, in bits: 0 if all are constant, 1 if all are fair coins."""
    shares = np.stack([means_sZ, 1 - means_sZ])
    # The logarithm of 0 is never used: 0 log 0 counts as 0.
    return np.asarray(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum(0).mean(1))


def flat_tokens(images: UInt8[np.ndarray, "n Y X 3"], grid: tuple[int, int]) -> Bool[np.ndarray, "n h w"]:
    """Says which tokens of a scale stand for flat areas of the images; their cells tile the image."""
    pixels_ncYX = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    range_nchw = adaptive_max_pool2d(pixels_ncYX, grid) + adaptive_max_pool2d(-pixels_ncYX, grid)
    return np.asarray((range_nchw <= FLAT_RANGE).all(1).numpy())


def area_entropy(bits_nhwZ: Bool[np.ndarray, "n h w Z"], is_in_nhw: Bool[np.ndarray, "n h w"]) -> float | None:
    """Returns the mean entropy per bit of some tokens of a scale, in bits; None if there is no such token."""
    bits_tZ = bits_nhwZ[is_in_nhw]
    return float(bit_entropy(bits_tZ.mean(0, dtype=np.float64, keepdims=True))[0]) if len(bits_tZ) else None
