"""How near one set of images comes to another: PSNR, foreground PSNR, SSIM, MS-SSIM and FLIP, one value per image.

Fidelity compares a run with our own full run of the same randomness; it says nothing about how good an image is. All
functions take uint8 RGB, give one value per image, and lose nothing of an image to another: statistics are taken over
per-image values, not over pooled pixels.

Axes: n images, Y rows, X columns.

Source: SSIM is Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", as
torchmetrics computes it: gaussian window of 11 pixels, sigma 1.5, one window around every pixel with the image
reflected at its border, mean over the colour channels. Implementations that leave the border out, as the paper does,
give other values for the same pair. We feed torchmetrics float64, where the variance of a flat background does not
drown in rounding. MS-SSIM is Wang et al. 2003, "Multiscale structural similarity for image quality assessment", five
sizes with the paper's weights, negative contrasts as zero. FLIP is Andersson et al. 2020, "FLIP: a difference evaluator
for alternating images", by its authors' package at its default of 67 pixels per degree.
"""

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from foveate.core.errors import FoveateError

PSNR_CAP_DB = 100.0
PIXEL_RANGE = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MS_SSIM_SIDE = 176
"""The smallest side whose five halvings all hold a window, as torchmetrics counts."""
FOREGROUND_TOLERANCE = 8
# SSIM needs about 15 float64 maps of every image; eight 512 px images take some 0.8 GB at most.
SSIM_BATCH = 8

WHITE = (255, 255, 255)


def psnr(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Peak signal-to-noise ratio of each image over all its pixels.

    Args:
        image: Images to judge.
        reference: What they should look like.

    Returns:
        dB, at most 100 (which equal images get).

    Raises:
        FoveateError: If the arrays do not pair up, or torchmetrics is missing.
    """
    _check_pair(image, reference)
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FoveateError(missing_extra("psnr")) from error

    # Image by image: a float64 copy of the whole set would take eight times its bytes, twice.
    values = [
        peak_signal_noise_ratio(_to_planes(one[None]), _to_planes(other[None]), data_range=PIXEL_RANGE).item()
        for one, other in zip(image, reference, strict=True)
    ]
    return np.minimum(np.asarray(values, dtype=np.float64), PSNR_CAP_DB)


def ssim(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Structural similarity of each image.

    Args:
        image: Images to judge, at least 11 pixels high and wide.
        reference: What they should look like.

    Returns:
        Values of at most 1, which equal images get.

    Raises:
        FoveateError: If the arrays do not pair up or are too small, or torchmetrics is missing.
    """
    _check_pair(image, reference)
    if min(image.shape[1:3]) < SSIM_WINDOW:
        size = f"{image.shape[1]} x {image.shape[2]}"
        raise FoveateError(f"ssim needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {size}")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FoveateError(missing_extra("ssim")) from error

    values = []
    for start in range(0, len(image), SSIM_BATCH):
        batch = slice(start, start + SSIM_BATCH)
        value = structural_similarity_index_measure(
            _to_planes(image[batch]),
            _to_planes(reference[batch]),
            gaussian_kernel=True,
            sigma=SSIM_SIGMA,
            kernel_size=SSIM_WINDOW,
            data_range=PIXEL_RANGE,
            reduction="none",
        )
        assert isinstance(value, Tensor), "torchmetrics gives a pair only when asked for more than the index"
        values.append(value.numpy())
    return np.concatenate(values).astype(np.float64)


def ms_ssim(image: UInt8[np.ndarray, "n Y X 3"], reference: UInt8[np.ndarray, "n Y X 3"]) -> Float64[np.ndarray, " n"]:
    """Multi-scale structural similarity of each image.

    Args:
        image: Images to judge, at least 176 pixels high and wide.
        reference: What they should look like.

    Returns:
        Values in [0, 1]; equal images get 1.

    Raises:
        FoveateError: If the arrays do not pair up or are too small, or torchmetrics is missing.
    """
    _check_pair(image, reference)
    if min(image.shape[1:3]) < MS_SSIM_SIDE:
        size = f"{image.shape[1]} x {image.shape[2]}"
        raise FoveateError(f"ms_ssim needs images of at least {MS_SSIM_SIDE} x {MS_SSIM_SIDE} pixels, got {size}")
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # noqa: PLC0415
    except ImportError as error:
        raise FoveateError(missing_extra("ms_ssim")) from error

    values = []
    for start in range(0, len(image), SSIM_BATCH):
        batch = slice(start, start + SSIM_BATCH)
        value = multiscale_structural_similarity_index_measure(
            _to_planes(image[batch]),
            _to_planes(reference[batch]),
            sigma=SSIM_SIGMA,
            kernel_size=SSIM_WINDOW,
            data_range=PIXEL_RANGE,
            reduction="none",
        )
        values.append(value.numpy())
    return np.concatenate(values).astype(np.float64)


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
        error = one[counts_YX].astype(np.float64) - other[counts_YX].astype(np.float64)
        values[index] = _decibel(float(np.square(error).mean()))
    return values


def _is_foreground(image: UInt8[np.ndarray, "Y X 3"], background: tuple[int, int, int]) -> np.ndarray:
    distance = np.abs(image.astype(np.int16) - np.asarray(background, dtype=np.int16))
    return np.asarray(distance.max(axis=-1) > FOREGROUND_TOLERANCE)


def _decibel(mean_square: float) -> float:
    if mean_square == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, float(10 * np.log10(PIXEL_RANGE**2 / mean_square)))


def _to_planes(images: UInt8[np.ndarray, "n Y X 3"]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).double()


def _check_pair(image: np.ndarray, reference: np.ndarray) -> None:
    for name, array in (("image", image), ("reference", reference)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:  # noqa: PLR2004 - the shape the message names
            raise FoveateError(f"{name} must be uint8 of shape (n, Y, X, 3), got {array.dtype} of shape {array.shape}")
    if image.shape != reference.shape:
        raise FoveateError(f"image and reference must have one shape, got {image.shape} and {reference.shape}")
    if image.shape[0] == 0:
        raise FoveateError("fidelity needs at least one pair of images, got none")


def missing_extra(name: str, package: str = "torchmetrics") -> str:
    """Says what `name` needs and how to get it."""
    return f'{name} needs {package}, which is not installed: pip install "foveate[eval]"'
