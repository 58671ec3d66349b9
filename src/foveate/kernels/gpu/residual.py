"""The gated residual added in place in one pass.

Axes: n packed tokens, R rows, C width.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels.gpu.launch import num_warps, power_of_two
from foveate.kernels.gpu.rows import lookup


@triton.jit
def _add_gated(
    x_ptr, change_ptr, gate_ptr, row_ptr,
    x_stride, change_stride, gate_stride, tokens_per_row, width,
    HAS_GATE: tl.constexpr, HAS_LOOKUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    is_inside = channel < width
    place = x_ptr + token * x_stride + channel
    x = tl.load(place, mask=is_inside, other=0.0)
    change = tl.load(change_ptr + token * change_stride + channel, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        row = token // tokens_per_row
        if HAS_LOOKUP:
            row = tl.load(row_ptr + token)
        change *= tl.load(gate_ptr + row * gate_stride + channel, mask=is_inside, other=0.0)
    tl.store(place, x + change, mask=is_inside)


def add_gated_(
    x_nC: Float[Tensor, "n C"],
    change_nC: Float[Tensor, "n C"],
    gate_RC: Float[Tensor, "R C"] | None,
    rows: Rows,
) -> None:
    """As `kernels.residual.add_gated_`.

    Args:
        x_nC: Hidden states, float32; changed. Neighbouring channels lie together, as in all other tensors.
        change_nC: What a sublayer computed, in any dtype.
        gate_RC: Float32; one entry per row of `rows`.
        rows: Which tokens belong to which row.
    """
    num_tokens, width = change_nC.shape
    if not num_tokens:
        return
    block = power_of_two(width)
    row_n, tokens_per_row = (None, 1) if gate_RC is None else lookup(rows, x_nC.device)
    with torch.cuda.device_of(x_nC):
        _add_gated[(num_tokens,)](
            x_nC, change_nC, gate_RC, row_n,
            x_nC.stride(0), change_nC.stride(0), 0 if gate_RC is None else gate_RC.stride(0), tokens_per_row, width,
            HAS_GATE=gate_RC is not None, HAS_LOOKUP=row_n is not None, BLOCK=block,
            num_warps=num_warps(block),
        )  # fmt: skip
