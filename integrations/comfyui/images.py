"""Images between foveate and ComfyUI, whose `IMAGE` is a tensor [B, H, W, C] of floats from 0 to 1.

Axes: n images, Y rows, X columns.
"""

import numpy as np
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.eval.fidelity import foreground_psnr, ms_ssim, psnr, ssim
from foveate.eval.structure import SMALLEST_SIDE, WINDOW

_RGB = 3


def to_image(array: np.ndarray) -> Tensor:
    """ComfyUI's images of bytes (n, Y, X, 3)."""
    return torch.from_numpy(array.astype(np.float32) / 255.0)


def to_bytes(image: Tensor) -> np.ndarray:
    """Bytes (n, Y, X, 3) of ComfyUI's images, rounded; images of `to_image` come back as they were.

    Raises:
        FoveateError: It has no three channels.
    """
    if image.ndim != _RGB + 1 or image.shape[-1] != _RGB:
        raise FoveateError(f"images must be RGB, [B, H, W, 3], got {list(image.shape)}; remove the alpha channel")
    return np.asarray(image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8).numpy())


def fidelity(image: np.ndarray, reference: np.ndarray) -> str:
    """A line per image: PSNR, PSNR of the foreground, SSIM and MS-SSIM, as far as the images are large enough.

    Raises:
        FoveateError: Both batches have not one shape.
    """
    if image.shape != reference.shape:
        sizes = f"{list(image.shape[:3])} and {list(reference.shape[:3])}"
        raise FoveateError(f"images and reference must have one shape, got {sizes}")
    metrics = {"PSNR": psnr(image, reference), "foreground PSNR": foreground_psnr(image, reference)}
    side = min(image.shape[1:3])
    metrics |= {"SSIM": ssim(image, reference)} if side >= WINDOW else {}
    metrics |= {"MS-SSIM": ms_ssim(image, reference)} if side >= SMALLEST_SIDE else {}
    lines = []
    for index, (one, other) in enumerate(zip(image, reference, strict=True)):
        values = [f"{name} {row[index]:.2f} dB" for name, row in metrics.items() if "PSNR" in name]
        values += [f"{name} {row[index]:.4f}" for name, row in metrics.items() if "SSIM" in name]
        lines.append(f"image {index}: {', '.join(values)}{', identical' if np.array_equal(one, other) else ''}")
    return "\n".join(lines)


def difference(image: np.ndarray, reference: np.ndarray, gain: float) -> Tensor:
    """The distance of both per pixel and channel, `gain` times, as ComfyUI's images; black where they agree."""
    apart = np.abs(image.astype(np.float32) - reference.astype(np.float32))
    return torch.from_numpy(np.clip(apart * (gain / 255.0), 0.0, 1.0))
