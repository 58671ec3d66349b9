"""Attention with its gradients: C code on a CPU with AMX, spelled out on other CPUs, torch's own elsewhere.

The C code holds no scores in memory: it computes them once more for the gradients, from the log-sum-exp
(FlashAttention-2, arXiv 2307.08691). To the compiler it is one operator.
Axes: B images, N heads, l queries, T keys, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake
from torch.utils.flop_counter import register_flop_formula

from foveate.kernels import native

_LANES = 16
"""The C code reads so many channels of a head at a time."""


def attend(
    q_BNlD: Float[Tensor, "B N l D"],
    k_BNTD: Float[Tensor, "B N T D"],
    v_BNTD: Float[Tensor, "B N T D"],
    scale: float,
    seen_Bl: Int[Tensor, "#B #l"] | None = None,
) -> Float[Tensor, "B N l D"]:
    """Softmax attention.

    Args:
        q_BNlD: Queries.
        k_BNTD: Keys.
        v_BNTD: Values.
        scale: Times the scores, above 0.
        seen_Bl: How many keys a query sees, at least 1; those behind them are masked. None: all.
    """
    if q_BNlD.device.type != "cpu":
        mask = None if seen_Bl is None else _mask(seen_Bl, k_BNTD.shape[2])
        return F.scaled_dot_product_attention(q_BNlD, k_BNTD, v_BNTD, attn_mask=mask, scale=scale)
    if q_BNlD.dtype is torch.bfloat16 and q_BNlD.shape[-1] % _LANES == 0 and _has_amx():
        if seen_Bl is not None:
            seen_Bl = seen_Bl.to(torch.int32).expand(len(q_BNlD), q_BNlD.shape[2])
        return _attend(q_BNlD, k_BNTD, v_BNTD, seen_Bl, scale)[0]
    return attend_spelled_out(q_BNlD, k_BNTD, v_BNTD, scale, seen_Bl)


def attend_spelled_out(
    q_BNlD: Float[Tensor, "B N l D"],
    k_BNTD: Float[Tensor, "B N T D"],
    v_BNTD: Float[Tensor, "B N T D"],
    scale: float,
    seen_Bl: Int[Tensor, "#B #l"] | None = None,
) -> Float[Tensor, "B N l D"]:
    """`attend` in three steps: on a CPU a third of the time of torch's fused one, gradients included."""
    score_BNlT = torch.matmul(q_BNlD, k_BNTD.transpose(-1, -2)) * scale
    if seen_Bl is not None:
        score_BNlT = score_BNlT.masked_fill(~_mask(seen_Bl, k_BNTD.shape[2]), -1e4)
    return torch.matmul(score_BNlT.softmax(-1), v_BNTD)


def _mask(seen_Bl: Tensor, num_keys: int) -> Tensor:
    return torch.arange(num_keys, device=seen_Bl.device) < seen_Bl[:, None, :, None]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_amx() -> bool:
    return native.has_amx()


def _empty(like_BNlD: Tensor) -> Tensor:
    """One token's heads together, as the layer behind attention reads them."""
    batch, heads, tokens, width = like_BNlD.shape
    return like_BNlD.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    return _empty(q), q.new_empty(batch, queries, heads, dtype=torch.float32)


def _laid_out(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _arguments(q: Tensor, k: Tensor) -> tuple[Any, int]:
    """Sizes and threads, as the C code takes them."""
    batch, heads, queries, width = q.shape
    threads = native.num_threads(batch * heads * queries * k.shape[2])
    return native.integers(batch, heads, queries, k.shape[2], width), threads


@custom_op("foveate_recipes::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the attention and the log-sum-exp of its scores, (B, l, N)."""
    q, k, v = (_laid_out(x) for x in (q, k, v))
    out, lse = _results(q)
    sizes, threads = _arguments(q, k)
    order = ((q, (0, 2, 1)), (k, (0, 1, 2)), (v, (0, 1, 2)), (out, (0, 2, 1)))
    strides = [tensor.stride(axis) for tensor, axes in order for axis in axes]
    failed = native.loaded().foveate_attend_amx(
        *(x.data_ptr() for x in (q, k, v, out, lse)),
        None if seen is None else seen.data_ptr(),
        sizes,
        native.integers(*strides, *((0, 0) if seen is None else seen.stride())),
        scale,
        threads,
    )
    if failed:
        raise MemoryError("no memory for packed keys and values")
    return out, lse


register_fake("foveate_recipes::attend", lambda q, *_: _results(q))


@custom_op("foveate_recipes::attend_gradients", mutates_args=())
def _gradients(tensors: list[Tensor], lse: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of queries, keys and values; `tensors` are those, the output and its gradient."""
    tensors = [_laid_out(x) for x in tensors]
    d_q, d_k, d_v = map(_empty, tensors[:3])
    everything = (*tensors, d_q, d_k, d_v)
    sizes, threads = _arguments(*tensors[:2])
    strides = [stride for x in everything for stride in x.stride()[:3]]
    failed = native.loaded().foveate_attend_gradients(
        native.pointers(*everything),
        lse.data_ptr(),
        None if seen is None else seen.data_ptr(),
        sizes,
        native.integers(*strides, *((0, 0) if seen is None else seen.stride())),
        scale,
        threads,
    )
    if failed:
        raise MemoryError("no memory for packed queries and their gradients")
    return d_q, d_k, d_v


register_fake("foveate_recipes::attend_gradients", lambda tensors, *_: tuple(map(_empty, tensors[:3])))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch gives it no type
    q, k, v, seen, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, seen, *output)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - as above
    """The log-sum-exp is not for use: nothing flows through it."""
    q, k, v, seen, out, lse = ctx.saved_tensors
    return *_gradients([q, k, v, out, d_out], lse, seen, ctx.scale), None, None


register_autograd("foveate_recipes::attend", _differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.foveate_recipes.attend)
def _flops(q_shape: Sequence[int], k_shape: Sequence[int], *_: object, **__: object) -> int:
    batch, heads, queries, width = q_shape
    return int(4 * batch * heads * queries * k_shape[2] * width)
