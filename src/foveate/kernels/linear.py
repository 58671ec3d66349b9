"""A linear layer through oneDNN on a CPU: the library that torch picks for float32 is slow on some processors.

Axes: n tokens, i inputs, o outputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foveate.kernels import native
from foveate.kernels.fp8 import Fp8Weight

_DTYPES = (torch.float32, torch.bfloat16)
_WIDENED_FROM = 128
"""Tokens from which a quantised layer in float32 is faster with its weights widened for oneDNN (docs/log.md)."""


def linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"] | Fp8Weight, bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """`torch.nn.functional.linear`, by oneDNN where no gradients are wanted; sums are float32 in both.

    Torch multiplies float32 matrices with MKL, which on AMD's processors reaches half of what oneDNN does. Weights of a
    class of their own (quantised ones) take torch's way but for many tokens in float32; so does everything under
    autocast. See `Fp8Weight` for those.
    """
    if isinstance(weight, Fp8Weight):
        return weight.product(x, bias)
    is_traced = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if is_traced or weight.device.type != "cpu" or x.dtype != weight.dtype or not native.allows_onednn():
        return F.linear(x, weight, bias)
    if is_traceable_wrapper_subclass(weight) and x.dtype is torch.float32 and x[..., 0].numel() >= _WIDENED_FROM:
        weight = weight.dequantize()
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _DTYPES:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """`torch.nn.Linear` that runs `linear`; same parameters, same names."""

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Runs the layer."""
        return linear(x, self.weight, self.bias)
