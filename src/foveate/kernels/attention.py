"""Softmax attention of rows that share a shape: what the cache of the engine and the text memory of a model both run.

Axes: n packed tokens, N heads, D head width, g rows of one group, m keys of a row.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels import native

_LANES = 16
"""The C code reads so many channels of a head at a time."""


def attend_group(
    q_nND: Float[Tensor, "n N D"],
    k_gNmD: Float[Tensor, "g N m D"],
    v_gNmD: Float[Tensor, "g N m D"],
    scale: float,
) -> Float[Tensor, "n N D"]:
    """Softmax attention of g rows with equally many queries and keys each; no mask.

    On a CPU with the instructions, C code computes it with scores and sums in float32, bit for bit the same for a query
    whatever stands beside it.

    Args:
        q_nND: Queries, row after row; one head's channels lie together.
        k_gNmD: Keys.
        v_gNmD: Values, with the strides of the keys.
        scale: Times the scores, above 0.
    """
    num_rows, num_heads, _, width = k_gNmD.shape
    q_glND = q_nND.unflatten(0, (num_rows, -1))
    is_laid_out = q_nND.stride(-1) == k_gNmD.stride(-1) == 1 and k_gNmD.stride() == v_gNmD.stride()
    if is_laid_out and width % _LANES == 0 and native.serves(q_nND, k_gNmD, v_gNmD):
        return _native(q_glND, k_gNmD, v_gNmD, scale).flatten(0, 1)
    out_gNlD = F.scaled_dot_product_attention(q_glND.transpose(1, 2), k_gNmD, v_gNmD, scale=scale)
    return out_gNlD.transpose(1, 2).reshape(-1, num_heads, width)


def _native(
    q_glND: Float[Tensor, "g l N D"], k_gNmD: Float[Tensor, "g N m D"], v_gNmD: Float[Tensor, "g N m D"], scale: float
) -> Float[Tensor, "g l N D"]:
    library = native.loaded()
    out_glND = q_glND.new_empty(q_glND.shape)
    num_rows, num_queries, num_heads, width = q_glND.shape
    num_keys = k_gNmD.shape[2]
    attend = library.foveate_attend_f32 if q_glND.dtype is torch.float32 else library.foveate_attend_bf16
    failed = attend(
        q_glND.data_ptr(),
        k_gNmD.data_ptr(),
        v_gNmD.data_ptr(),
        out_glND.data_ptr(),
        native.integers(num_rows, num_heads, num_queries, num_keys, width),
        native.integers(*q_glND.stride()[:3], *k_gNmD.stride()[:3], *out_glND.stride()[:3]),
        scale,
        native.num_threads(num_rows * num_heads * num_queries * num_keys),
    )
    if failed:
        raise MemoryError("no memory for packed keys and values")
    return out_glND
