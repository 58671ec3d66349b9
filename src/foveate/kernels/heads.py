"""Queries and keys of unit length, turned by their positions.

Axes: n packed tokens, N heads, D head width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels import native
from foveate.kernels.gpu import launch


def rotate(x_nND: Float[Tensor, "*b n N D"], rotation_nD: Float[Tensor, "n D"]) -> Float[Tensor, "*b n N D"]:
    """Rotates neighbouring pairs (2i, 2i + 1); `rotation_nD` holds the cosines, then the sines, of D/2 angles each."""
    cos_n1d, sin_n1d = rotation_nD.unsqueeze(1).chunk(2, dim=-1)
    even, odd = x_nND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos_n1d * even - sin_n1d * odd, sin_n1d * even + cos_n1d * odd), dim=-1).flatten(-2)


def unit_heads(x_nND: Float[Tensor, "*b n N D"]) -> Float[Tensor, "*b n N D"]:
    """Scales each head's vector to length one, float32."""
    return F.normalize(x_nND.float(), dim=-1, eps=1e-12)


def unit_rotated(
    qkv_n3ND: Float[Tensor, "n 3 N D"], gain_N: Float[Tensor, " N"], rotation_nD: Float[Tensor, "n _d"]
) -> tuple[Float[Tensor, "n N D"], Float[Tensor, "n N D"], Float[Tensor, "n N D"]]:
    """Queries of length `gain_N`, keys of length one, both rotated, and the values as they were.

    Everything in between is float32. The memory of `qkv_n3ND` may be used for what is returned.

    Args:
        qkv_n3ND: Queries, keys and values.
        gain_N: Length of the queries of each head, float32.
        rotation_nD: As `rotate` takes it, float32; without columns nothing is rotated.
    """
    if qkv_n3ND.shape[-1] % 2 == 0 and launch.serves(qkv_n3ND, gain_N, rotation_nD):
        return launch.run("heads", _triton, _plain, qkv_n3ND, gain_N, rotation_nD)
    if not (qkv_n3ND.is_contiguous() and rotation_nD.is_contiguous() and native.serves(qkv_n3ND, gain_N, rotation_nD)):
        return _plain(qkv_n3ND, gain_N, rotation_nD)
    library = native.loaded()
    num_tokens, _, num_heads, width = qkv_n3ND.shape
    library.foveate_heads(
        qkv_n3ND.data_ptr(),
        native.dtype_code(qkv_n3ND),
        gain_N.data_ptr(),
        rotation_nD.data_ptr() if rotation_nD.shape[-1] > 0 else 0,
        num_tokens,
        num_heads,
        width,
        native.num_threads(qkv_n3ND.numel()),
    )
    q_nND, k_nND, v_nND = qkv_n3ND.unbind(1)
    return q_nND, k_nND, v_nND


def _plain(
    qkv_n3ND: Float[Tensor, "n 3 N D"], gain_N: Float[Tensor, " N"], rotation_nD: Float[Tensor, "n _d"]
) -> tuple[Float[Tensor, "n N D"], Float[Tensor, "n N D"], Float[Tensor, "n N D"]]:
    q_nND, k_nND, v_nND = qkv_n3ND.unbind(1)
    q_nND, k_nND = unit_heads(q_nND) * gain_N[:, None], unit_heads(k_nND)
    if rotation_nD.shape[-1] > 0:
        q_nND, k_nND = rotate(q_nND, rotation_nD), rotate(k_nND, rotation_nD)
    return q_nND.to(v_nND.dtype), k_nND.to(v_nND.dtype), v_nND


def _triton(
    qkv_n3ND: Float[Tensor, "n 3 N D"], gain_N: Float[Tensor, " N"], rotation_nD: Float[Tensor, "n _d"]
) -> tuple[Float[Tensor, "n N D"], Float[Tensor, "n N D"], Float[Tensor, "n N D"]]:
    launch.kernel("heads").unit_rotated_(qkv_n3ND, gain_N, rotation_nD)
    q_nND, k_nND, v_nND = qkv_n3ND.unbind(1)
    return q_nND, k_nND, v_nND
