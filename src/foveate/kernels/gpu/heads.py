"""Queries and keys of unit length, with gain and rotation, in place and in one pass.

One program per token and kind (query or key) holds all heads, neighbouring channels as pairs.
Axes: n packed tokens, N heads, D head width.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.gpu.launch import num_warps, power_of_two


@triton.jit
def _unit_rotated(
    qkv_ptr, gain_ptr, rotation_ptr, token_stride, rotation_stride, num_heads, num_pairs,
    HAS_ROTATION: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, pair = tl.arange(0, HEADS), tl.arange(0, PAIRS)
    side = tl.arange(0, 2)
    inside_head, inside_pair = head < num_heads, pair < num_pairs
    inside_hp = inside_head[:, None] & inside_pair[None, :]
    inside_hp2 = inside_hp[:, :, None] & (side[None, None, :] < 2)
    place = head[:, None, None] * (2 * num_pairs) + 2 * pair[None, :, None] + side[None, None, :]
    place = qkv_ptr + token * token_stride + kind * (2 * num_heads * num_pairs) + place
    even, odd = tl.split(tl.load(place, mask=inside_hp2, other=0.0).to(tl.float32))
    length = tl.maximum(tl.sqrt(tl.sum(even * even + odd * odd, axis=1)), 1e-12)
    gain = tl.load(gain_ptr + head, mask=inside_head & (kind == 0), other=1.0)
    even = even / length[:, None] * gain[:, None]
    odd = odd / length[:, None] * gain[:, None]
    if HAS_ROTATION:
        angle = rotation_ptr + token * rotation_stride + pair
        cos = tl.load(angle, mask=inside_pair, other=0.0)[None, :]
        sin = tl.load(angle + num_pairs, mask=inside_pair, other=0.0)[None, :]
        even, odd = cos * even - sin * odd, sin * even + cos * odd
    tl.store(place, tl.join(even, odd).to(qkv_ptr.dtype.element_ty), mask=inside_hp2)


def unit_rotated_(
    qkv_n3ND: Float[Tensor, "n 3 N D"], gain_N: Float[Tensor, " N"], rotation_nD: Float[Tensor, "n _d"]
) -> None:
    """As `kernels.heads.unit_rotated`, in place; values stay as they are, and everything in between is float32.

    Args:
        qkv_n3ND: Queries, keys and values; kind, head and channel of a token lie together. D is even.
        gain_N: Length of the queries of each head, float32.
        rotation_nD: D/2 cosines, then D/2 sines, float32; without columns nothing is rotated.
    """
    num_tokens, _, num_heads, width = qkv_n3ND.shape
    if not num_tokens:
        return
    heads, pairs = power_of_two(num_heads), power_of_two(width // 2)
    with torch.cuda.device_of(qkv_n3ND):
        _unit_rotated[(num_tokens, 2)](
            qkv_n3ND, gain_N, rotation_nD, qkv_n3ND.stride(0), rotation_nD.stride(0), num_heads, width // 2,
            HAS_ROTATION=rotation_nD.shape[1] > 0, HEADS=heads, PAIRS=pairs, num_warps=num_warps(2 * heads * pairs),
        )  # fmt: skip
