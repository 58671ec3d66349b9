"""SSIM and MS-SSIM of image pairs, one value per image.

SSIM is Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity": gaussian window of
11 pixels, sigma 1.5, one window around every pixel with the image reflected at its border, mean over the colour
channels. Implementations that leave the border out, as the paper does, give other values for the same pair. MS-SSIM is
Wang et al. 2003, "Multiscale structural similarity for image quality assessment": five sizes with the paper's weights,
negative terms as zero. Both are torchmetrics' numbers, which a test compares. They are computed here because float64,
where the variance of a flat background does not drown in rounding, takes its convolution 1.7 s per image of 256 pixels;
a blur written as two banded matrix products takes 0.1 s.

Axes: c colour channels, Y rows, X columns.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

WINDOW = 11
SIGMA = 1.5
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five sizes, the largest first."""
SMALLEST_SIDE = 176
"""Whose fifth size still holds a window, as torchmetrics counts."""

_RANGE = 255.0
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Terms:
    """Means over one size: of luminance times contrast, and of contrast alone, which leaves the border out."""

    similarity: float
    contrast: float


def structural(image: UInt8[np.ndarray, "Y X 3"], reference: UInt8[np.ndarray, "Y X 3"]) -> float:
    """SSIM of one pair, at most 1."""
    return _terms(_planes(image), _planes(reference)).similarity


def multiscale_structural(image: UInt8[np.ndarray, "Y X 3"], reference: UInt8[np.ndarray, "Y X 3"]) -> float:
    """MS-SSIM of one pair of at least 176 pixels a side, in [0, 1]."""
    one_cYX, other_cYX = _planes(image), _planes(reference)
    product = 1.0
    for weight in WEIGHTS[:-1]:
        product *= max(_terms(one_cYX, other_cYX).contrast, 0.0) ** weight
        one_cYX, other_cYX = _halved(one_cYX), _halved(other_cYX)
    return float(product * max(_terms(one_cYX, other_cYX).similarity, 0.0) ** WEIGHTS[-1])


def _terms(x_cYX: Float64[Tensor, "c Y X"], y_cYX: Float64[Tensor, "c Y X"]) -> _Terms:
    blur = _blur_of(*x_cYX.shape[1:])
    mean_x, mean_y = blur(x_cYX), blur(y_cYX)
    var_x = (blur(x_cYX * x_cYX) - mean_x**2).clamp(min=0)
    var_y = (blur(y_cYX * y_cYX) - mean_y**2).clamp(min=0)
    contrast = (2 * (blur(x_cYX * y_cYX) - mean_x * mean_y) + _C2) / (var_x + var_y + _C2)
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    edge = WINDOW // 2
    inner = contrast[:, edge:-edge, edge:-edge]
    return _Terms(similarity=float((luminance * contrast).mean()), contrast=float(inner.mean()))


def _blur_of(height: int, width: int) -> Callable[[Tensor], Tensor]:
    rows, columns = _gaussian(height), _gaussian(width).T
    return lambda planes_cYX: rows @ planes_cYX @ columns


@functools.lru_cache(maxsize=16)
def _gaussian(size: int) -> Float64[Tensor, "Y Y"]:
    """The blur along one side as a matrix; a window that leaves the image is reflected at its last pixel."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    matrix = np.zeros((size, size))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        places = np.abs(np.arange(size) + offset)
        places = np.where(places >= size, 2 * (size - 1) - places, places)
        matrix[np.arange(size), places] += weight
    return torch.from_numpy(matrix)


def _halved(planes_cYX: Float64[Tensor, "c Y X"]) -> Float64[Tensor, "c Y2 X2"]:
    return torch.nn.functional.avg_pool2d(planes_cYX, 2)


def _planes(image: UInt8[np.ndarray, "Y X 3"]) -> Float64[Tensor, "3 Y X"]:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).double()
