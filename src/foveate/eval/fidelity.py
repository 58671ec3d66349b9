"""How near one set of images comes to another: PSNR, SSIM, foreground PSNR and equal bytes.

Fidelity compares a run with our own full run of the same randomness; it says nothing about how good an image is. All
functions take uint8 RGB, give one value per image, and lose nothing of an image to another: statistics are taken over
per-image values, not over pooled pixels.

Axes: n images, Y rows, X columns.

Source: SSIM is Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", as
torchmetrics computes it: gaussian window of 11 pixels, sigma 1.5, one window around every pixel with the image
reflected at its border, mean over the colour channels. Implementations that leave the border out, as the paper does,
give other values for the same pair. We feed torchmetrics float64, where the variance of a flat background does not
drown in rounding.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from foveate.core.errors import FoveateError

PSNR_CAP_DB = 100.0
PIXEL_RANGE = 255.0
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
FOREGROUND_TOLERANCE = 8
# SSIM needs about 15 float64 maps of every image; eight 512 px images take some 0.8 GB at most.
SSIM_BATCH = 8

WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Mean, tenth percentile and minimum of per-image values.

    Attributes:
        mean: Arithmetic mean.
        p10: Tenth percentile, linear between the two nearest values.
        min: Smallest value.
    """

    mean: float
    p10: float
    min: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FidelityReport:
    """Fidelity of a set of images to their references.

    Attributes:
        num_images: Number of pairs.
        psnr: PSNR over all pixels, dB.
        ssim: Structural similarity, at most 1.
        foreground_psnr: PSNR over the pixels that are not background, dB.
        identical: Number of pairs with equal bytes.
    """

    num_images: int
    psnr: Summary
    ssim: Summary
    foreground_psnr: Summary
    identical: int

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data, in the keys that every JSON output of this library uses."""
        return {
            "n": self.num_images,
            "psnr": asdict(self.psnr),
            "ssim": asdict(self.ssim),
            "foreground_psnr": asdict(self.foreground_psnr),
            "identical": self.identical,
        }


def summarise(values: Iterable[float]) -> Summary:
    """Summarises per-image values.

    Args:
        values: At least one finite value.

    Returns:
        Mean, tenth percentile and minimum.

    Raises:
        FoveateError: If there is no value, or one that is not finite.
    """
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise FoveateError("a summary needs at least one value, got none")
    if not np.isfinite(array).all():
        raise FoveateError(f"a summary needs finite values, got {array[~np.isfinite(array)][0]}")
    return Summary(
        mean=float(array.mean()),
        p10=float(np.percentile(array, 10, method="linear")),
        min=float(array.min()),
    )


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


def fidelity_report(
    images: UInt8[np.ndarray, "n Y X 3"],
    references: UInt8[np.ndarray, "n Y X 3"],
    background: tuple[int, int, int] = WHITE,
) -> FidelityReport:
    """Compares a set of images with their references.

    Args:
        images: Images to judge.
        references: One for each image, in the same order.
        background: RGB of the flat background, for the foreground PSNR.

    Returns:
        All fidelity figures of the set.

    Raises:
        FoveateError: If the arrays do not pair up or are empty, or torchmetrics is missing.
    """
    _check_pair(images, references)
    return FidelityReport(
        num_images=len(images),
        psnr=summarise(psnr(images, references)),
        ssim=summarise(ssim(images, references)),
        foreground_psnr=summarise(foreground_psnr(images, references, background)),
        identical=int((images == references).all(axis=(1, 2, 3)).sum()),
    )


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


def missing_extra(name: str) -> str:
    """Says what `name` needs and how to get it."""
    return f'{name} needs torchmetrics, which is not installed: pip install "foveate[eval]"'
