"""The transformer block of BERT, post-norm with exact GELU and without dropout, under its published parameter names.

Axes: `B` rows, `T` text tokens, `E` width, `N` heads, `D` width of a head, `F` width inside the feed-forward.
"""

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.errors import FoveateError
from foveate.core.layers import Linear


def require_sizes(sizes: Mapping[str, int]) -> None:
    """Checks the fields of a configuration that has `width` and `num_heads` among them.

    Raises:
        FoveateError: If one is below 1, or the heads do not divide the width.
    """
    for name, value in sizes.items():
        if value < 1:
            raise FoveateError(f"{name} must be at least 1, got {value}")
    if sizes["width"] % sizes["num_heads"]:
        raise FoveateError(f"width must be a multiple of num_heads = {sizes['num_heads']}, got {sizes['width']}")


class _SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)

    def forward(self, x_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        q_BNTD, k_BNTD, v_BNTD = (
            project(x_BTE).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        y_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, attn_mask=mask_BT[:, None, None, :])
        return y_BNTD.transpose(1, 2).flatten(2)


class _AddAndNorm(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.dense = Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, y_BTF: Float[Tensor, "B T F"], x_BTE: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        z_BTE: Tensor = self.LayerNorm(x_BTE + self.dense(y_BTF))
        return z_BTE


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self = _SelfAttention(width, num_heads)
        self.output = _AddAndNorm(width, width)

    def forward(self, x_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        z_BTE: Tensor = self.output(self.self(x_BTE, mask_BT), x_BTE)
        return z_BTE


class _Intermediate(nn.Module):
    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.dense = Linear(width, hidden_width)

    def forward(self, x_BTE: Float[Tensor, "B T E"]) -> Float[Tensor, "B T F"]:
        return F.gelu(self.dense(x_BTE))


class BertBlock(nn.Module):
    """One block: attention over the real tokens, then the feed-forward, each followed by its norm.

    Args:
        width: Width E of the features.
        num_heads: Attention heads N; they divide `width`.
        hidden_width: Width F inside the feed-forward.
    """

    def __init__(self, width: int, num_heads: int, hidden_width: int) -> None:
        super().__init__()
        self.attention = _Attention(width, num_heads)
        self.intermediate = _Intermediate(width, hidden_width)
        self.output = _AddAndNorm(hidden_width, width)

    def forward(self, x_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        """Computes the features behind the block.

        Args:
            x_BTE: Those in front of it.
            mask_BT: True at real tokens; at least one in each row.
        """
        x_BTE = self.attention(x_BTE, mask_BT)
        z_BTE: Tensor = self.output(self.intermediate(x_BTE), x_BTE)
        return z_BTE
