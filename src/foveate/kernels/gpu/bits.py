"""Bits from logits in one pass: top-p and the comparison with the draw.

Of two values the better one always stays, and top-p rules the other one out if its probability is at most 1 - top-p; so
no sort is needed.
Axes: k tokens that ran, d bits of a token.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024
"""Bits of a program, on 4 warps."""


@triton.jit
def _sample_bits(logits_ptr, u_ptr, bits_ptr, num_bits, top_p, BLOCK: tl.constexpr):
    bit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = bit < num_bits
    low = tl.load(logits_ptr + 2 * bit, mask=is_inside, other=0.0).to(tl.float32)
    high = tl.load(logits_ptr + 2 * bit + 1, mask=is_inside, other=0.0).to(tl.float32)
    best = tl.maximum(low, high)
    share_low, share_high = tl.exp(low - best), tl.exp(high - best)
    p_high = share_high / (share_low + share_high)
    p_worse = tl.minimum(share_low, share_high) / (share_low + share_high)
    # With equal logits the first value, 0, is the best.
    p_high = tl.where((top_p > 0) & (p_worse <= 1 - top_p), tl.where(high > low, 1.0, 0.0), p_high)
    u = tl.load(u_ptr + bit, mask=is_inside, other=1.0)
    tl.store(bits_ptr + bit, (u < p_high).to(tl.int64), mask=is_inside)


def sample_bits(logits_kd2: Float[Tensor, "k d 2"], u_kd: Float[Tensor, "k d"], top_p: float) -> Int[Tensor, "k d"]:
    """As `kernels.bits.sample_bits`; int64."""
    logits_kd2, u_kd = logits_kd2.contiguous(), u_kd.contiguous()
    bits_kd = logits_kd2.new_empty(u_kd.shape, dtype=torch.int64)
    num_bits = bits_kd.numel()
    if num_bits:
        with torch.cuda.device_of(logits_kd2):
            _sample_bits[(triton.cdiv(num_bits, _BLOCK),)](
                logits_kd2, u_kd, bits_kd, num_bits, top_p, BLOCK=_BLOCK, num_warps=4
            )
    return bits_kd
