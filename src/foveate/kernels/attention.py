"""Softmax attention of rows that share a shape: what the cache of the engine and the text memory of a model both run.

Axes: n packed tokens, N heads, D head width, g rows of one group, l queries and m keys of a row.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.attention import SDPBackend

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
    q_glND = q_nND.unflatten(0, (len(k_gNmD), -1))
    if _is_for_native(q_nND, k_gNmD, v_gNmD):
        return _native(q_glND, k_gNmD, v_gNmD, scale, None).flatten(0, 1)
    if q_nND.device.type == "cpu" and len(k_gNmD) > 1 and not torch.is_grad_enabled():
        # Torch's kernel shares rows among threads, and a head's bits depend on the thread: each row by itself does not.
        rows = zip(q_glND, k_gNmD, v_gNmD, strict=True)
        return torch.cat([attend_group(q_lND, k_NmD[None], v_NmD[None], scale) for q_lND, k_NmD, v_NmD in rows])
    out_gNlD = F.scaled_dot_product_attention(q_glND.transpose(1, 2), k_gNmD, v_gNmD, scale=scale)
    return out_gNlD.transpose(1, 2).reshape(q_nND.shape)


def attend_group_lse(
    q_nND: Float[Tensor, "n N D"],
    k_gNmD: Float[Tensor, "g N m D"],
    v_gNmD: Float[Tensor, "g N m D"],
    scale: float,
) -> tuple[Float[Tensor, "n N D"], Float32[Tensor, "n N"]]:
    """`attend_group`, bit for bit, and the log-sum-exp of the scores.

    It costs nothing beside the attention where the C code or torch's flash kernel for CPUs runs. Elsewhere (a GPU,
    gradients, `torch.compile`) the scores are computed once more, in float32, and all of them stand in memory.

    Args:
        q_nND: Queries, row after row; one head's channels lie together.
        k_gNmD: Keys, at least one.
        v_gNmD: Values, with the strides of the keys.
        scale: Times the scores, above 0.

    Returns:
        The attention, and log sum_j exp(scale * q . k_j) of each query and head: a natural logarithm.
    """
    q_glND = q_nND.unflatten(0, (len(k_gNmD), -1))
    if _is_for_native(q_nND, k_gNmD, v_gNmD):
        lse_glN = q_glND.new_empty(q_glND.shape[:3], dtype=torch.float32)
        return _native(q_glND, k_gNmD, v_gNmD, scale, lse_glN).flatten(0, 1), lse_glN.flatten(0, 1)
    if q_nND.device.type == "cpu" and len(k_gNmD) > 1 and not torch.is_grad_enabled():
        # As in `attend_group`.
        rows = zip(q_glND, k_gNmD, v_gNmD, strict=True)
        parts = [attend_group_lse(q_lND, k_NmD[None], v_NmD[None], scale) for q_lND, k_NmD, v_NmD in rows]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    q_gNlD = q_glND.transpose(1, 2)
    if _is_for_flash_on_cpu(q_gNlD, k_gNmD, v_gNmD, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_gNlD, lse_gNl = flash(q_gNlD, k_gNmD, v_gNmD, scale=scale)
    else:
        out_gNlD = F.scaled_dot_product_attention(q_gNlD, k_gNmD, v_gNmD, scale=scale)
        lse_gNl = (scale * q_gNlD.float() @ k_gNmD.float().mT).logsumexp(-1)
    return out_gNlD.transpose(1, 2).reshape(q_nND.shape), lse_gNl.float().transpose(1, 2).flatten(0, 1)


def attend_group_copies(
    q_nND: Float[Tensor, "n N D"],
    k_gNmD: Float[Tensor, "g N m D"],
    v_gNmD: Float[Tensor, "g N m D"],
    scale: float,
    copies: int,
) -> Float[Tensor, "n N D"]:
    """`attend_group` where the first key and value of every row stand for `copies` equal ones.

    On a CPU two key sets are merged by their log-sum-exp: all keys once, and the first key `copies` - 1 times.
    Elsewhere, where that would hold all scores in memory (`attend_group_lse`), the key is really repeated.

    Args:
        q_nND: Queries, row after row; one head's channels lie together.
        k_gNmD: Keys.
        v_gNmD: Values, with the strides of the keys.
        scale: Times the scores, above 0.
        copies: At least 2.
    """
    if q_nND.device.type != "cpu" or torch.is_grad_enabled():
        k_gNMD, v_gNMD = (torch.cat((x[:, :, :1].expand(-1, -1, copies - 1, -1), x), 2) for x in (k_gNmD, v_gNmD))
        return attend_group(q_nND, k_gNMD, v_gNMD, scale)
    out_nND, lse_nN = attend_group_lse(q_nND, k_gNmD, v_gNmD, scale)
    rows = zip(*(x.unflatten(0, (len(k_gNmD), -1)) for x in (q_nND, out_nND, lse_nN)), k_gNmD, v_gNmD, strict=True)
    # Row by row: a vectorised exponential has other bits at the end of a thread's share.
    return torch.cat([_merged_first(*row, scale=scale, more=copies - 1) for row in rows])


def _merged_first(
    q_lND: Float[Tensor, "l N D"],
    out_lND: Float[Tensor, "l N D"],
    lse_lN: Float32[Tensor, "l N"],
    k_NmD: Float[Tensor, "N m D"],
    v_NmD: Float[Tensor, "N m D"],
    *,
    scale: float,
    more: int,
) -> Float[Tensor, "l N D"]:
    """One row's attention with its first key and value `more` times more."""
    score_lN = scale * (q_lND.float() * k_NmD[:, 0].float()).sum(-1)
    share_lN1 = torch.sigmoid(score_lN + math.log(more) - lse_lN)[..., None]
    wide_lND = out_lND.float()
    return (wide_lND + share_lN1 * (v_NmD[:, 0].float() - wide_lND)).to(out_lND.dtype)


def entropy(q_nND: Float[Tensor, "n N D"], k_gNmD: Float[Tensor, "g N m D"], scale: float) -> Float32[Tensor, "n N"]:
    """Entropy of the attention weights of each query and head, in nats, from 0 to log m.

    With weights p and scores s it is log-sum-exp(s) - sum_j p_j s_j, and the sum is scale * q . (sum_j p_j k_j): one
    pass of attention with the keys as values, and no weights in memory. The error grows with the largest score: to
    about 1e-6 of it in float32, and to 2^-8 of it in bfloat16, which rounds the weights and the mean key.

    Args:
        q_nND: Queries, row after row; one head's channels lie together.
        k_gNmD: Keys, at least one.
        scale: Times the scores, above 0.
    """
    mean_key_nND, lse_nN = attend_group_lse(q_nND, k_gNmD, k_gNmD, scale)
    mean_score_nN = scale * (q_nND.float() * mean_key_nND.float()).sum(-1)
    return (lse_nN - mean_score_nN).clamp(0.0, math.log(k_gNmD.shape[2]))


def _is_for_native(
    q_nND: Float[Tensor, "n N D"], k_gNmD: Float[Tensor, "g N m D"], v_gNmD: Float[Tensor, "g N m D"]
) -> bool:
    is_laid_out = q_nND.stride(-1) == k_gNmD.stride(-1) == 1 and k_gNmD.stride() == v_gNmD.stride()
    return is_laid_out and q_nND.shape[-1] % _LANES == 0 and native.serves(q_nND, k_gNmD, v_gNmD)


def _is_for_flash_on_cpu(
    q_gNlD: Float[Tensor, "g N l D"], k_gNmD: Float[Tensor, "g N m D"], v_gNmD: Float[Tensor, "g N m D"], scale: float
) -> bool:
    """Whether `scaled_dot_product_attention` would run the kernel whose log-sum-exp is at hand, but has no gradient."""
    if q_gNlD.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return torch._fused_sdp_choice(q_gNlD, k_gNmD, v_gNmD, scale=scale) == SDPBackend.FLASH_ATTENTION.value


def _native(
    q_glND: Float[Tensor, "g l N D"],
    k_gNmD: Float[Tensor, "g N m D"],
    v_gNmD: Float[Tensor, "g N m D"],
    scale: float,
    lse_glN: Float32[Tensor, "g l N"] | None,
) -> Float[Tensor, "g l N D"]:
    """The attention by C code, which fills `lse_glN` too where it is given; that must be contiguous."""
    library = native.loaded()
    out_glND = q_glND.new_empty(q_glND.shape)
    num_rows, num_queries, num_heads, width = q_glND.shape
    num_keys = k_gNmD.shape[2]
    tensors = (
        *(x.data_ptr() for x in (q_glND, k_gNmD, v_gNmD, out_glND)),
        None if lse_glN is None else lse_glN.data_ptr(),
    )
    others = (
        native.integers(num_rows, num_heads, num_queries, num_keys, width),
        native.integers(*q_glND.stride()[:3], *k_gNmD.stride()[:3], *v_gNmD.stride()[:3], *out_glND.stride()[:3]),
        scale,
        native.num_threads(num_rows * num_heads * num_queries * num_keys),
    )
    if q_glND.dtype is torch.float32:
        failed = library.foveate_attend_f32(*tensors, *others)
    elif native.has_amx():
        failed = library.foveate_attend_amx(*tensors, None, *others)
    else:
        failed = library.foveate_attend_bf16(*tensors, *others)
    if failed:
        raise MemoryError("no memory for packed keys and values")
    return out_glND
