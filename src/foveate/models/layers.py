"""Small layers that the families share: the feed-forward net, adaptive normalisation, rotary positions.

Axes: n packed tokens, C width, F feed-forward width, N heads, D head width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
        """Runs the layer."""
        return self.fc2(F.gelu(self.fc1(x_nC), approximate="tanh"))


def modulated_norm(
    x_nC: Float[Tensor, "n C"], scale_nC: Float[Tensor, "n C"], shift_nC: Float[Tensor, "n C"], eps: float = 1e-6
) -> Float[Tensor, "n C"]:
    """Layer norm without weights, then (1 + scale) * x + shift; float32."""
    normed_nC = F.layer_norm(x_nC, x_nC.shape[-1:], eps=eps)
    return torch.addcmul(shift_nC, normed_nC, scale_nC + 1)


def rms_norm(x: Float[Tensor, "... E"], weight_E: Float[Tensor, " E"], eps: float = 1e-6) -> Float[Tensor, "... E"]:
    """Root-mean-square norm in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_E.float()


def rotate(x_nND: Float[Tensor, "n N D"], rotation_nD: Float[Tensor, "n D"]) -> Float[Tensor, "n N D"]:
    """Rotates neighbouring pairs (2i, 2i + 1); `rotation_nD` holds the cosines, then the sines, of D/2 angles each."""
    cos_n1d, sin_n1d = rotation_nD.unsqueeze(1).chunk(2, dim=-1)
    even, odd = x_nND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos_n1d * even - sin_n1d * odd, sin_n1d * even + cos_n1d * odd), dim=-1).flatten(-2)


def unit_heads(x_nND: Float[Tensor, "n N D"]) -> Float[Tensor, "n N D"]:
    """Scales each head's vector to length one, float32."""
    return F.normalize(x_nND.float(), dim=-1, eps=1e-12)


def running_dtype(weight: Tensor) -> torch.dtype:
    """Dtype that a linear layer with this weight computes in: that of autocast where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear32(parent: nn.Module, name: str, x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
    """Runs a linear layer of a module in float32, whatever the dtype of its weights, under autocast too."""
    weight, bias = parent.get_parameter(f"{name}.weight"), parent.get_parameter(f"{name}.bias")
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), bias.float())
