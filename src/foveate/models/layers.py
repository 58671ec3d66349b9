"""Small layers that the families share: feed-forward nets, norms, modulation, rotary angles, float32 linear layers.

Axes: n packed tokens, R rows, l tokens of a scale, C width, D head width, E width of a text, a angles of a token.
"""

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.rows import Rows
from foveate.core.transfer import to_device
from foveate.kernels.activation import gelu, silu
from foveate.kernels.linear import Linear, linear
from foveate.kernels.norm import norm_modulate

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


class GatedFeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = Linear(width, hidden, bias=False)
        self.gate_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Runs the sublayer."""
        return self.down_proj(silu(self.gate_proj(x_nC)) * self.up_proj(x_nC))


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
        return linear(x.float(), layer.weight.float(), layer.bias.float(), layer.tile_rows, layer.whole_rows)


class Modulation(nn.Sequential):
    """SiLU and a linear layer in float32: what a condition makes of gates, scales and shifts, side by side.

    The layer's published name is its number, 1.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition_RC: Float[Tensor, "R C"]) -> Float[Tensor, "R k C"]:
        """Modulation of every row, float32."""
        return linear32(self, "1", F.silu(condition_RC)).unflatten(-1, (self.parts, -1))


class HeadNorm(nn.Module):
    """Norm in front of the head with a scale and a shift of the condition.

    A layer norm without weights or, where it `is_root` (HART), a root-mean-square norm with learned ones.
    """

    def __init__(self, width: int, *, is_root: bool = False) -> None:
        super().__init__()
        self.ln_wo_grad = nn.RMSNorm(width) if is_root else None
        self.ada_lin = Modulation(width, 2)

    def forward(self, x_nC: Float[Tensor, "n C"], head_R2C: Float[Tensor, "r 2 C"], rows: Rows) -> Float[Tensor, "n C"]:
        """Normed hidden states, float32; `head_R2C` are factors (1 + scale) and shifts of these rows, maybe of more."""
        factor_RC, shift_RC = head_R2C[: len(rows.counts)].unbind(1)
        if self.ln_wo_grad is not None:
            normed_nC = rms_norm(x_nC, self.ln_wo_grad.weight)
            return torch.addcmul(rows.spread(shift_RC), normed_nC, rows.spread(factor_RC))
        return norm_modulate(x_nC, factor_RC, shift_RC, rows, torch.float32)


def axial_frequencies(head_width: int) -> Float[Tensor, " a"]:
    """Frequencies of rotary positions in two axes, a quarter of a head's width each; float32, on the host."""
    return 1.0 / (10000.0 ** (torch.arange(0, head_width, 4, device="cpu").float() / head_width))


def rotation_of(angles_la: Float[Tensor, "l a"], device: torch.device) -> Float[Tensor, "l D"]:
    """Cosines, then sines, of rotary angles, as `kernels.heads.rotate` takes them."""
    return to_device(torch.cat((angles_la.cos(), angles_la.sin()), dim=-1), device)
