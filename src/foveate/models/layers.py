"""Small layers that the families share: the feed-forward net, the root-mean-square norm, float32 linear layers.

Axes: n packed tokens, C width, E width of a text.
"""

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.kernels.activation import gelu
from foveate.kernels.linear import Linear, linear

B = TypeVar("B", bound=nn.Module)


def narrowed(block: B, dtype: torch.dtype) -> B:
    """A copy of a block with its weights in another dtype; the block is left as it was."""
    return copy.deepcopy(block).to(dtype)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Runs the layer."""
        return self.fc2(gelu(self.fc1(x_nC)))


def rms_norm(x: Float[Tensor, "... E"], weight_E: Float[Tensor, " E"], eps: float = 1e-6) -> Float[Tensor, "... E"]:
    """Root-mean-square norm in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_E.float()


def running_dtype(weight: Tensor) -> torch.dtype:
    """Dtype that a linear layer with this weight computes in: that of autocast where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear32(parent: nn.Module, name: str, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
    """Runs a linear layer of a module in float32, whatever the dtype of its weights, under autocast too."""
    layer = parent.get_submodule(name)
    assert isinstance(layer, Linear), "the models make their layers of this class"
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.float(), layer.weight.float(), layer.bias.float(), layer.tile_rows)


def with_factors(modulation: Float[Tensor, "... k C"], first: int, end: int) -> Float[Tensor, "... k C"]:
    """Turns scales into factors, 1 + scale, at the positions `first` up to `end` of the second last axis, in place."""
    modulation[..., first:end, :] += 1
    return modulation
