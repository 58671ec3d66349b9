"""Self-attention and cross-attention over packed rows, as all families have them.

What differs is how queries and keys are normalised, and with it the published names of the parameters. Rows see their
own tokens alone: self-attention those of the row's slot in the cache, cross-attention the row's text, whose keys and
values are computed once per request. Rows of equal shape share one call.
Axes: n packed tokens, R rows, C width, N heads, D head width, T text tokens, E text width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.kernels.attention import attend_group
from foveate.kernels.heads import rotate, unit_rotated
from foveate.kernels.linear import Linear, linear


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMemory:
    """Keys and values of the text of every row for one block, computed once per request."""

    lengths: tuple[int, ...]
    k_RNTD: tuple[Float[Tensor, "N _T D"], ...]
    v_RNTD: tuple[Float[Tensor, "N _T D"], ...]

    def keep(self, rows: Sequence[int]) -> "TextMemory":
        """Memory of some of the rows, in the given order."""
        return TextMemory(
            lengths=tuple(self.lengths[r] for r in rows),
            k_RNTD=tuple(self.k_RNTD[r] for r in rows),
            v_RNTD=tuple(self.v_RNTD[r] for r in rows),
        )

    def join(self, others: Sequence["TextMemory"]) -> "TextMemory":
        """These rows and those of others behind them; nothing is copied."""
        parts = [self, *others]
        return TextMemory(
            lengths=tuple(length for part in parts for length in part.lengths),
            k_RNTD=tuple(k_NTD for part in parts for k_NTD in part.k_RNTD),
            v_RNTD=tuple(v_NTD for part in parts for v_NTD in part.v_RNTD),
        )

    def attend(self, q_nND: Float[Tensor, "n N D"], rows: Rows, scale: float) -> Float[Tensor, "n N D"]:
        """Attends from each row's tokens to that row's text."""
        parts = []
        for a, b in rows.groups(self.lengths):
            q = q_nND[rows.starts[a] : rows.starts[b]]
            if q.shape[0]:
                k_gNTD, v_gNTD = (_stacked(memory[a:b], q.dtype) for memory in (self.k_RNTD, self.v_RNTD))
                parts.append(attend_group(q, k_gNTD, v_gNTD, scale))
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class SelfAttention(nn.Module):
    """Attention with normalised queries and keys, then rotary positions where the family has them.

    Normalised either by head (VAR, Infinity): unit length, times a learned temperature of each head; keys have no bias.
    Or, with `norms_width` (Switti): a layer norm over the full width, before the split into heads.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, norms_width: bool = False) -> None:
        super().__init__()
        self.heads, self.norms_width = heads, norms_width
        if norms_width:
            self.to_qkv = Linear(width, 3 * width)
        else:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
            self.mat_qkv = Linear(width, 3 * width, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
            self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        # The learned temperature stands in the queries.
        self.scale = (width // heads) ** -0.5 if norms_width else 1.0
        self.proj = Linear(width, width)

    def forward(self, x_nC: Float[Tensor, "n C"], context: BlockContext) -> Float[Tensor, "n C"]:
        """Runs the sublayer on packed tokens."""
        heads = self._width_normed if self.norms_width else self._unit_heads
        return self.proj(context.slot.attend(*heads(x_nC, context.rotation_nD), self.scale).flatten(1))

    def _unit_heads(
        self, x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n _d"]
    ) -> tuple[Float[Tensor, "n N D"], Float[Tensor, "n N D"], Float[Tensor, "n N D"]]:
        qkv_nC = _biased(self.mat_qkv, x_nC, self.q_bias, self.zero_k_bias, self.v_bias)
        gain_N = self.scale_mul_1H11.float().clamp_max(math.log(100.0)).exp().view(-1)
        return unit_rotated(qkv_nC.view(x_nC.shape[0], 3, self.heads, -1), gain_N, rotation_nD)

    def _width_normed(
        self, x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n D"]
    ) -> tuple[Float[Tensor, "n N D"], Float[Tensor, "n N D"], Float[Tensor, "n N D"]]:
        q_nC, k_nC, v_nC = self.to_qkv(x_nC).chunk(3, dim=-1)
        q_nND, k_nND = (
            rotate(_full_norm(part_nC).unflatten(-1, (self.heads, -1)), rotation_nD).to(v_nC.dtype)
            for part_nC in (q_nC, k_nC)
        )
        return q_nND, k_nND, v_nC.unflatten(-1, (self.heads, -1))


class CrossAttention(nn.Module):
    """Attention to the text, without positions.

    Queries and keys are as they come (Infinity, whose keys have no bias) or, with `norms_width` (Switti), normalised
    over the full width. Where it pools, the queries are learned, one per head.
    """

    zero_k_bias: Tensor
    mat_q: Any
    """Makes the queries, or holds the learned ones: the published names leave one attribute for both."""

    def __init__(
        self, width: int, heads: int, text_width: int, *, is_pool: bool = False, norms_width: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.norms_width = heads, norms_width
        self.scale = (width // heads) ** -0.5
        if norms_width:
            self.to_q = Linear(width, width)
            self.to_kv = Linear(text_width, 2 * width)
        else:
            if is_pool:
                self.mat_q = nn.Parameter(torch.zeros(1, heads, width // heads))
            else:
                self.mat_q = Linear(width, width)
            self.mat_kv = Linear(text_width, 2 * width, bias=False)
            self.v_bias = nn.Parameter(torch.zeros(width))
            self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        self.proj = Linear(width, width)

    def init_own_weights(self) -> None:
        """Initialises the learned queries, where there are any."""
        if not self.norms_width and isinstance(self.mat_q, nn.Parameter):
            self.mat_q.normal_(std=(3 * self.mat_q[0].numel()) ** -0.5)

    def memory(self, text_TE: Float[Tensor, "t E"], lengths: tuple[int, ...]) -> TextMemory:
        """Keys and values of packed texts."""
        if self.norms_width:
            k_TC, v_TC = self.to_kv(text_TE).chunk(2, dim=-1)
            k_TC = _full_norm(k_TC).to(v_TC.dtype)
        else:
            k_TC, v_TC = _biased(self.mat_kv, text_TE, self.zero_k_bias, self.v_bias).chunk(2, dim=-1)
        keys, values = (
            tuple(text.unflatten(-1, (self.heads, -1)).transpose(0, 1).contiguous() for text in part_TC.split(lengths))
            for part_TC in (k_TC, v_TC)
        )
        return TextMemory(lengths=lengths, k_RNTD=keys, v_RNTD=values)

    def forward(self, x_nC: Float[Tensor, "n C"], rows: Rows, memory: TextMemory) -> Float[Tensor, "n C"]:
        """Attends from packed tokens to the texts of their rows."""
        q_nC = _full_norm(self.to_q(x_nC)).to(x_nC.dtype) if self.norms_width else self.mat_q(x_nC)
        return self.proj(memory.attend(q_nC.unflatten(-1, (self.heads, -1)), rows, self.scale).flatten(1))

    def pool(self, text_TE: Float[Tensor, "t E"], lengths: tuple[int, ...]) -> Float[Tensor, "R C"]:
        """One vector per text: attention of the learned queries."""
        memory = self.memory(text_TE, lengths)
        query_RND = self.mat_q.expand(len(lengths), -1, -1).to(text_TE.dtype)
        return self.proj(memory.attend(query_RND, Rows((1,) * len(lengths)), self.scale).flatten(1))


def _biased(layer: Linear, x: Float[Tensor, "n i"], *biases: Float[Tensor, " _c"]) -> Float[Tensor, "n o"]:
    """A linear layer whose bias is put together of those of its parts."""
    return linear(x, layer.weight, torch.cat(biases), layer.tile_rows, layer.whole_rows)


def _full_norm(x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """Layer norm without weights over the full width; float32."""
    return F.layer_norm(x_nC.float(), x_nC.shape[-1:], eps=1e-6)


def _stacked(rows: Sequence[Float[Tensor, "N T D"]], dtype: torch.dtype) -> Float[Tensor, "g N T D"]:
    """Keys or values of rows of one length, in the dtype of the queries; a single row is not copied."""
    stacked_gNTD = rows[0][None] if len(rows) == 1 else torch.stack(list(rows))
    return stacked_gNTD.to(dtype)
