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

    def attend(self, q_nND: Float[Tensor, "n N D"], rows: Rows, scale: float) -> Float[Tensor, "n N D"]:
        """Attends from each row's tokens to that row's text."""
        parts = []
        for a, b in rows.groups(self.lengths):
            q = q_nND[rows.starts[a] : rows.starts[b]]
            if q.shape[0]:
                parts.append(attend_group(q, torch.stack(self.k_RNTD[a:b]), torch.stack(self.v_RNTD[a:b]), scale))
        return torch.cat(parts) if len(parts) != 1 else parts[0]
