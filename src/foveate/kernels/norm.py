"""Layer norm with a factor and a shift per row: the entrance of every sublayer and of the head.

Axes: n packed tokens, R rows, C width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels import native
from foveate.kernels.gpu import launch


def norm_modulate(
    x_nC: Float[Tensor, "n C"],
    factor_RC: Float[Tensor, "R C"],
    shift_RC: Float[Tensor, "R C"],
    rows: Rows,
    dtype: torch.dtype,
    eps: float = 1e-6,
) -> Float[Tensor, "n C"]:
    """Layer norm without weights of its own, times the factor and plus the shift of each token's row.

    Args:
        x_nC: Hidden states, float32.
        factor_RC: Float32; one entry per row of `rows`.
        shift_RC: As the factor.
        rows: Which tokens belong to which row.
        dtype: Of what is returned; everything before is float32.
        eps: Added to the variance.
    """
    if launch.serves(x_nC, factor_RC, shift_RC):
        return launch.run("norm", _triton, _plain, x_nC, factor_RC, shift_RC, rows, dtype, eps)
    is_whole = factor_RC.stride(-1) == shift_RC.stride(-1) == 1 and x_nC.is_contiguous()
    if dtype not in (torch.float32, torch.bfloat16) or not is_whole or not native.serves(x_nC, factor_RC, shift_RC):
        return _plain(x_nC, factor_RC, shift_RC, rows, dtype, eps)
    library = native.loaded()
    out_nC = x_nC.new_empty(x_nC.shape, dtype=dtype)
    library.foveate_norm(
        x_nC.data_ptr(),
        factor_RC.data_ptr(),
        factor_RC.stride(0),
        shift_RC.data_ptr(),
        shift_RC.stride(0),
        out_nC.data_ptr(),
        native.dtype_code(out_nC),
        native.integers(*rows.starts),
        *x_nC.shape,
        eps,
        native.num_threads(x_nC.numel()),
    )
    return out_nC


def _plain(
    x_nC: Float[Tensor, "n C"],
    factor_RC: Float[Tensor, "R C"],
    shift_RC: Float[Tensor, "R C"],
    rows: Rows,
    dtype: torch.dtype,
    eps: float,
) -> Float[Tensor, "n C"]:
    normed_nC = F.layer_norm(x_nC, x_nC.shape[-1:], eps=eps)
    return torch.addcmul(rows.spread(shift_RC), normed_nC, rows.spread(factor_RC)).to(dtype)


def _triton(
    x_nC: Float[Tensor, "n C"],
    factor_RC: Float[Tensor, "R C"],
    shift_RC: Float[Tensor, "R C"],
    rows: Rows,
    dtype: torch.dtype,
    eps: float,
) -> Float[Tensor, "n C"]:
    out_nC: Tensor = launch.kernel("norm").norm_modulate(x_nC, factor_RC, shift_RC, rows, dtype, eps)
    return out_nC
