"""How near one set of images comes to another: PSNR, foreground PSNR, SSIM, MS-SSIM and FLIP, one value per image.

Fidelity compares a run with our own full run of the same randomness; it says nothing about how good an image is. All
functions take uint8 RGB, give one value per image, and lose nothing of an image to another: statistics are taken over
per-image values, not over pooled pixels.

Axes: n images, Y rows, X columns.

Source: FLIP is Andersson et al. 2020, "FLIP: a difference evaluator for alternating images", by its authors' package at
its default of 67 pixels per degree. SSIM and MS-SSIM: `structure`.
"""

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from foveate.core.errors import FoveateError
from foveate.eval.structure import SMALLEST_SIDE, WINDOW, multiscale_structural, structural

PSNR_CAP_DB = 100.0
PIXEL_RANGE = 255.0
FOREGROUND_TOLERANCE = 8

WHITE = (255, 255, 255)


def psnr(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of each image over all its pixels.

    Args:
        image: Images to judge.
        reference: What they should look like.

    Returns:
        dB, at most 100 (which equal images get).

    Raises:
        FoveateError: If the arrays do not pair up.
    """
    _check_pair(image, reference)
    return np.asarray(
        [
            _decibel(float(np.square(_signed(one) - _signed(other)).mean()))
            for one, other in zip(image, reference, strict=True)
        ]
    )


def ssim(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Structural similarity of each image.

    Args:
        image: Images to judge, at least 11 pixels high and wide.
        reference: What they should look like.

    Returns:
        Values of at most 1, which equal images get.

    Raises:
        FoveateError: If the arrays do not pair up or are too small.
    """
    _check_pair(image, reference)
    if min(image.shape[1:3]) < WINDOW:
        size = f"{image.shape[1]} x {image.shape[2]}"
        raise FoveateError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {size}")
    return np.asarray([structural(one, other) for one, other in zip(image, reference, strict=True)])


def ms_ssim(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Multi-scale structural similarity of each image.

    Args:
        image: Images to judge, at least 176 pixels high and wide.
        reference: What they should look like.

    Returns:
        Values in [0, 1]; equal images get 1.

    Raises:
        FoveateError: If the arrays do not pair up or are too small.
    """
    _check_pair(image, reference)
    if min(image.shape[1:3]) < SMALLEST_SIDE:
        size = f"{image.shape[1]} x {image.shape[2]}"
        raise FoveateError(f"ms_ssim needs images of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, got {size}")
    return np.asarray([multiscale_structural(one, other) for one, other in zip(image, reference, strict=True)])


def flip_maps(
    image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]
) -> Float32[np.ndarray, "n Y X"]:
    """What somebody sees who flips between each image and its reference, per pixel.

    Args:
        image: Images to judge.
        reference: What they should look like.

    Returns:
        Values in [0, 1], 0 where nothing is seen. The mean of a map is the FLIP error of the image.

    Raises:
        FoveateError: If the arrays do not pair up, or flip-evaluator is missing.
    """
    _check_pair(image, reference)
    try:
        from flip_evaluator import evaluate  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FoveateError(missing_extra("flip", "flip-evaluator")) from error

    maps = np.empty(image.shape[:3], dtype=np.float32)
    for index, (one, other) in enumerate(zip(image, reference, strict=True)):
        unit_one, unit_other = (np.ascontiguousarray(side, dtype=np.float32) / PIXEL_RANGE for side in (one, other))
        found, _, _ = evaluate(
            unit_other.astype(np.float32), unit_one.astype(np.float32), "LDR", applyMagma=False, computeMeanError=False
        )
        maps[index] = found[..., 0]
    return maps


def foreground_psnr(
    image: UInt8[np.ndarray, "n Y X 3"],
    reference: UInt8[np.ndarray, "n Y X 3"],
    background: tuple[int, int, int] = WHITE,
) -> Float64[np.ndarray, " n"]:
    """PSNR of each image over the pixels that are not background.

    Drawings on a flat background get a flattering PSNR from the many pixels that nobody can get wrong. Here a pixel
    counts if in either image some channel is more than 8 levels away from the background. An image without such a pixel
    is judged on all of them.

    Args:
        image: Images to judge.
        reference: What they should look like.
        background: RGB of the flat background, 0 to 255.

    Returns:
        dB, at most 100.

    Raises:
        FoveateError: If the arrays do not pair up.
    """
    _check_pair(image, reference)
    values = np.empty(len(image), dtype=np.float64)
    for index, (one, other) in enumerate(zip(image, reference, strict=True)):
        counts_YX = _is_foreground(one, background) | _is_foreground(other, background)
        if not counts_YX.any():
            counts_YX = np.ones_like(counts_YX)
        error = _signed(one[counts_YX]) - _signed(other[counts_YX])
        values[index] = _decibel(float(np.square(error).mean()))
    return values


def _is_foreground(image: UInt8[np.ndarray, "Y X 3"], background: tuple[int, int, int]) -> np.ndarray:
    distance = np.abs(image.astype(np.int16) - np.asarray(background, dtype=np.int16))
    return np.asarray(distance.max(axis=-1) > FOREGROUND_TOLERANCE)


def _decibel(mean_square: float) -> float:
    if mean_square == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, float(10 * np.log10(PIXEL_RANGE**2 / mean_square)))


def _signed(levels: np.ndarray) -> np.ndarray:
    return levels.astype(np.float64)


def _check_pair(image: np.ndarray, reference: np.ndarray) -> None:
    for name, array in (("image", image), ("reference", reference)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:  # noqa: PLR2004 - the shape the message names
            raise FoveateError(f"{name} must be uint8 of shape (n, Y, X, 3), got {array.dtype} of shape {array.shape}")
    if image.shape != reference.shape:
        raise FoveateError(f"image and reference must have one shape, got {image.shape} and {reference.shape}")
    if image.shape[0] == 0:
        raise FoveateError("fidelity needs at least one pair of images, got none")


def missing_extra(name: str, package: str) -> str:
    """Says what `name` needs and how to get it."""
    return f'{name} needs {package}, which is not installed: pip install "foveate[eval]"'
