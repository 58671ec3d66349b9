"""Bits from two logits each: the probability of 1 after top-p against a draw.

Axes: k tokens that ran, d bits of a token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.kernels.gpu import launch


def keep_two(logits_kd2: Float[Tensor, "k d 2"], top_p: float) -> Float[Tensor, "k d 2"]:
    """The logits with -inf where top-p, above 0, rules the worse value out: its probability is at most 1 - top-p."""
    share = logits_kd2.softmax(-1)
    is_low = share <= 1 - top_p
    is_best = torch.zeros_like(is_low).scatter_(-1, share.argmax(-1, keepdim=True), True)
    return logits_kd2.masked_fill(is_low & ~is_best, -torch.inf)


def sample_bits(logits_kd2: Float[Tensor, "k d 2"], u_kd: Float[Tensor, "k d"], top_p: float) -> Int[Tensor, "k d"]:
    """Bit = u < p(1); int64.

    Args:
        logits_kd2: Of the values 0 and 1, after guidance and temperature.
        u_kd: Draws in (0, 1), float32.
        top_p: In [0, 1]; 0 rules nothing out.
    """
    if launch.serves(logits_kd2, u_kd):
        return launch.run("bits", _triton, _plain, logits_kd2, u_kd, top_p)
    return _plain(logits_kd2, u_kd, top_p)


def _plain(logits_kd2: Float[Tensor, "k d 2"], u_kd: Float[Tensor, "k d"], top_p: float) -> Int[Tensor, "k d"]:
    logits_kd2 = logits_kd2.float()
    filtered = keep_two(logits_kd2, top_p) if top_p > 0 else logits_kd2
    return (u_kd < filtered.softmax(-1)[..., 1]).long()


def _triton(logits_kd2: Float[Tensor, "k d 2"], u_kd: Float[Tensor, "k d"], top_p: float) -> Int[Tensor, "k d"]:
    bits_kd: Tensor = launch.kernel("bits").sample_bits(logits_kd2, u_kd, top_p)
    return bits_kd
