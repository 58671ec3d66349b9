"""Layer norm with a factor and a shift per row in one pass.

One program per token holds the whole width: the input is read once and the output written once.
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
def _norm(
    x_ptr, factor_ptr, shift_ptr, out_ptr, row_ptr,
    x_stride, factor_stride, shift_stride, tokens_per_row, width, eps,
    HAS_LOOKUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = token // tokens_per_row
    if HAS_LOOKUP:
        row = tl.load(row_ptr + token)
    channel = tl.arange(0, BLOCK)
    is_inside = channel < width
    x = tl.load(x_ptr + token * x_stride + channel, mask=is_inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + row * factor_stride + channel, mask=is_inside, other=0.0)
    shift = tl.load(shift_ptr + row * shift_stride + channel, mask=is_inside, other=0.0)
    centred = tl.where(is_inside, x - tl.sum(x, axis=0) / width, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    out = centred / tl.sqrt(variance + eps) * factor + shift
    tl.store(out_ptr + token * width + channel, out.to(out_ptr.dtype.element_ty), mask=is_inside)


def norm_modulate(
    x_nC: Float[Tensor, "n C"],
    factor_RC: Float[Tensor, "R C"],
    shift_RC: Float[Tensor, "R C"],
    rows: Rows,
    dtype: torch.dtype,
    eps: float,
) -> Float[Tensor, "n C"]:
    """As `kernels.norm.norm_modulate`; float32 in between.

    Args:
        x_nC: Hidden states; neighbouring channels lie together, as in all other tensors.
        factor_RC: Float32; one entry per row of `rows`.
        shift_RC: As the factor.
        rows: Which tokens belong to which row.
        dtype: Of what is returned: float32, bfloat16 or float16.
        eps: Added to the variance.
    """
    width = x_nC.shape[1]
    out_nC = x_nC.new_empty((rows.total, width), dtype=dtype)
    if not rows.total:
        return out_nC
    block = power_of_two(width)
    row_n, tokens_per_row = lookup(rows, x_nC.device)
    with torch.cuda.device_of(x_nC):
        _norm[(rows.total,)](
            x_nC, factor_RC, shift_RC, out_nC, row_n,
            x_nC.stride(0), factor_RC.stride(0), shift_RC.stride(0), tokens_per_row, width, eps,
            HAS_LOOKUP=row_n is not None, BLOCK=block, num_warps=num_warps(block),
        )  # fmt: skip
    return out_nC
