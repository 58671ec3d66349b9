"""Softmax attention of rows that share a shape: what the cache of the engine and the text memory of a model both run.

Axes: n packed tokens, N heads, D head width, g rows of one group, m keys of a row.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend_group(
    q_nND: Float[Tensor, "n N D"],
    k_gNmD: Float[Tensor, "g N m D"],
    v_gNmD: Float[Tensor, "g N m D"],
    scale: float,
) -> Float[Tensor, "n N D"]:
    """Softmax attention of g rows with equally many queries and keys each; no mask."""
    num_rows, num_heads, _, width = k_gNmD.shape
    q_gNlD = q_nND.view(num_rows, -1, num_heads, width).transpose(1, 2)
    out_gNlD = F.scaled_dot_product_attention(q_gNlD, k_gNmD, v_gNmD, scale=scale)
    return out_gNlD.transpose(1, 2).reshape(-1, num_heads, width)
