"""Cross-attention over packed rows: each row's tokens see that row's text, rows of equal shape share one call.

Axes: n packed tokens, R rows, N heads, D head width, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels.attention import attend_group


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


def _stacked(rows: Sequence[Float[Tensor, "N T D"]], dtype: torch.dtype) -> Float[Tensor, "g N T D"]:
    """Keys or values of rows of one length, in the dtype of the queries; a single row is not copied."""
    stacked_gNTD = rows[0][None] if len(rows) == 1 else torch.stack(list(rows))
    return stacked_gNTD.to(dtype)
