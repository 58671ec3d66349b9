"""A linear layer through oneDNN on a CPU: the library that torch picks for float32 is slow on some processors.

Axes: n tokens, i inputs, o outputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.kernels import native

_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """`torch.nn.functional.linear`, by oneDNN where no gradients are wanted; sums are float32 in both.

    Torch multiplies float32 matrices with MKL, which on AMD's processors reaches half of what oneDNN does. Weights of a
    class of their own (quantised ones) and everything under autocast take torch's way.
    """
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in _DTYPES and x.dtype == weight.dtype
    is_traced = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if is_plain and not is_traced and weight.device.type == "cpu" and native.allows_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` that runs `linear`; same parameters, same names."""

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Runs the layer."""
        return linear(x, self.weight, self.bias)
