"""A linear layer through oneDNN on a CPU: the library that torch picks for float32 is slow on some processors.

A row shall not depend on the rows beside it. A library multiplies few rows by other code than many, with sums in
another order: a single row runs as two, and where that is not enough (`invariance` finds out) all rows run in tiles.
`FOVEATE_ONEDNN=0` leaves every matmul to torch. Axes: n tokens, i inputs, o outputs.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from foveate.core import layers
from foveate.kernels import native, switches
from foveate.kernels.primitive_caches import bound_primitive_caches

logger = logging.getLogger("foveate")

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
    whole_rows: int | None = None,
) -> Float[Tensor, "*n o"]:
    """`torch.nn.functional.linear`, by oneDNN where no gradients are wanted; sums are float32 in both.

    Torch multiplies float32 matrices with MKL, which on AMD's processors reaches half of what oneDNN does. Weights of a
    class of their own (quantised ones) take torch's way but for many tokens in float32; so does everything under
    autocast.

    Args:
        x: Tokens.
        weight: Of the layer.
        bias: Of the layer.
        tile_rows: Rows of one matmul, at least 1, so that no row depends on how many there are; None for all at once.
            Ignored where gradients are wanted.
        whole_rows: Rows of a larger tile of which a row has the same bits; as many of these as there are rows for run
            first. None for small ones only.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if tile_rows is not None:
        return _tiled(x, weight, bias, tile_rows, whole_rows)
    if x.numel() == x.shape[-1] and x.device.type == "cpu":
        return _tiled(x, weight, bias, LEAST_ROWS)
    return _product(x, weight, bias)


class Linear(layers.Linear):
    """`core.layers.Linear` that runs `linear`; same parameters, same names.

    Attributes:
        tile_rows: As `linear` takes it; set on a layer whose rows would depend on each other otherwise.
        whole_rows: As well.
    """

    tile_rows: int | None = None
    whole_rows: int | None = None

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Runs the layer."""
        return linear(x, self.weight, self.bias, self.tile_rows, self.whole_rows)


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether `linear` multiplies plain weights of this dtype on a CPU by oneDNN, where no gradients are wanted."""
    return dtype in _DTYPES and native.allows_onednn() and _onednn_multiplies(dtype)


def describe_products() -> str:
    """The library for matmuls of plain weights on this CPU: `onednn`, or `torch` and why, by dtype if they differ."""
    if not native.allows_onednn():
        is_built = switches.is_on("FOVEATE_ONEDNN")
        return f"torch ({'it was built without oneDNN' if is_built else 'switched off by FOVEATE_ONEDNN=0'})"
    refused = [str(dtype).removeprefix("torch.") for dtype in _DTYPES if not takes_onednn(dtype)]
    return (
        "onednn" if not refused else f"onednn, but torch in {' and '.join(refused)}: the processor lacks instructions"
    )


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matmuls of this dtype for this processor; asked once, and checked by a matmul.

    It has none in bfloat16 without AVX-512, and raises where it is asked for one.
    """
    bound_primitive_caches()
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        # FLOP counters and fake tensors of this thread must not see the probe, nor the probe them.
        with _disable_current_modes(), torch.inference_mode():
            ones_ni = torch.ones(3, 16, dtype=dtype, device="cpu")
            return bool((_onednn(ones_ni, ones_ni, None) == ones_ni.shape[1]).all())
    except (AttributeError, RuntimeError) as error:
        logger.info("torch multiplies in %s: oneDNN cannot (%s)", dtype, str(error).splitlines()[0][:200])
        return False


def _product(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    """All rows at once, by the library that suits the weights; without gradients."""
    is_ours = not torch.is_autocast_enabled("cpu") and x.dtype == weight.dtype
    if not is_ours or weight.device.type != "cpu" or not takes_onednn(weight.dtype):
        return F.linear(x, weight, bias)
    if is_traceable_wrapper_subclass(weight) and x.dtype is torch.float32 and x[..., 0].numel() >= _WIDENED_FROM:
        weight = weight.dequantize()
    if type(weight) not in (Tensor, nn.Parameter):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _tiled(
    x: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    tile_rows: int,
    whole_rows: int | None = None,
) -> Float[Tensor, "*n o"]:
    """Matmuls of `whole_rows`, then of `tile_rows` rows each; the last is filled up with repeats of its last row."""
    x_ni = x.reshape(-1, x.shape[-1])
    num_rows = len(x_ni)
    if not num_rows:
        return _product(x, weight, bias)
    num_whole = 0 if whole_rows is None else num_rows // whole_rows * whole_rows
    tiles = list(x_ni[:num_whole].split(whole_rows)) if whole_rows is not None and num_whole else []
    rest_ni = x_ni[num_whole:]
    if len(rest_ni):
        missing = -len(rest_ni) % tile_rows
        if missing:
            rest_ni = torch.cat((rest_ni, rest_ni[-1:].expand(missing, -1)))
        tiles += rest_ni.split(tile_rows)
    out_no = torch.cat([_product(tile_ti, weight, bias) for tile_ti in tiles])
    return out_no[:num_rows].view(*x.shape[:-1], -1)
