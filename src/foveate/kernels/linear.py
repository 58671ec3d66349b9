"""A linear layer through oneDNN on a CPU: the library that torch picks for float32 is slow on some processors.

A row shall not depend on the rows beside it. A library multiplies few rows by other code than many, with sums in
another order: a single row runs as two, and where that is not enough (`invariance` finds out) all rows run in tiles.
Axes: n tokens, i inputs, o outputs.
"""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foveate.kernels import native

LEAST_ROWS = 2
"""Rows that a CPU multiplies at least: a single one runs as so many, as no library sums it like a row of a matrix."""

_DTYPES = (torch.float32, torch.bfloat16)
_WIDENED_FROM = 128
"""Tokens from which a quantised layer in float32 is faster with its weights widened for oneDNN (docs/log.md)."""


def linear(
    x: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None = None,
    tile_rows: int | None = None,
) -> Float[Tensor, "*n o"]:
    """`torch.nn.functional.linear`, by oneDNN where no gradients are wanted; sums are float32 in both.

    Torch multiplies float32 matrices with MKL, which on AMD's processors reaches half of what oneDNN does. Weights of a
    class of their own (quantised ones) take torch's way but for many tokens in float32; so does everything under
    autocast.

    Args:
        x: Tokens.
        weight: Of the layer.
        bias: Of the layer.
        tile_rows: Rows of one product, at least 1, so that a row never sees how many there are; None for all at once.
            Ignored where gradients are wanted.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if tile_rows is not None:
        return _tiled(x, weight, bias, tile_rows)
    if x.numel() == x.shape[-1] and x.device.type == "cpu":
        return _tiled(x, weight, bias, LEAST_ROWS)
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` that runs `linear`; same parameters, same names.

    Attributes:
        tile_rows: As `linear` takes it; set on a layer whose rows would depend on each other otherwise.
    """

    tile_rows: int | None = None

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Runs the layer."""
        return linear(x, self.weight, self.bias, self.tile_rows)


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether `linear` multiplies plain weights of this dtype on a CPU by oneDNN, where no gradients are wanted."""
    if dtype not in _DTYPES or not native.allows_onednn():
        return False
    return dtype is not torch.bfloat16 or _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this processor: it refuses those without AVX-512."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _product(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    """All rows at once, by the library that suits the weights; no gradients are wanted."""
    is_ours = not torch.is_autocast_enabled("cpu") and x.dtype == weight.dtype
    if not is_ours or weight.device.type != "cpu" or not takes_onednn(weight.dtype):
        return F.linear(x, weight, bias)
    if is_traceable_wrapper_subclass(weight) and x.dtype is torch.float32 and x[..., 0].numel() >= _WIDENED_FROM:
        weight = weight.dequantize()
    if type(weight) not in (Tensor, nn.Parameter):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _tiled(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, tile_rows: int
) -> Float[Tensor, "*n o"]:
    """Products of `tile_rows` rows each; the last tile is filled up with repeats of its last row."""
    x_ni = x.reshape(-1, x.shape[-1])
    num_rows = len(x_ni)
    if not num_rows:
        return _product(x, weight, bias)
    missing = -num_rows % tile_rows
    if missing:
        x_ni = torch.cat((x_ni, x_ni[-1:].expand(missing, -1)))
    out_no = torch.cat([_product(tile_ti, weight, bias) for tile_ti in x_ni.split(tile_rows)])
    return out_no[:num_rows].view(*x.shape[:-1], -1)
