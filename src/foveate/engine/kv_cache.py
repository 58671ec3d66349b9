"""Keys and values of earlier scales: allocated once at a known bound, owned by one request.

Layout per block: (R, N, M, D) in the compute dtype, M the bound of that block. The last scale is never stored: its own
keys lie behind a copy of the prefix in one scratch that all blocks share.
Axes: R rows, N heads, M tokens at most, D head width, n packed tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.rows import Rows
from foveate.core.transfer import numbers
from foveate.kernels.attention import attend_group


class KVCache:
    """The cache of a request; nothing of it is stored on a module."""

    def __init__(
        self,
        shape: ModelShape,
        num_rows: int,
        capacities: Sequence[int],
        scratch_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates everything that the request may need.

        Args:
            shape: Of the model.
            num_rows: Rows at the start.
            capacities: Per block, the tokens that a row stores at most.
            scratch_tokens: Most tokens of a row at the last scale.
            dtype: Compute dtype.
            device: Where.
        """
        heads, width = shape.num_heads, shape.head_width

        def empty(tokens: int) -> Tensor:
            return torch.empty(num_rows, heads, tokens, width, dtype=dtype, device=device)

        self.k_RNMD = [empty(tokens) for tokens in capacities]
        self.v_RNMD = [empty(tokens) for tokens in capacities]
        self.lengths = [[0] * num_rows for _ in capacities]
        behind = max(capacities, default=0) + scratch_tokens
        self.scratch_k_RNMD, self.scratch_v_RNMD = empty(behind), empty(behind)

    @property
    def num_bytes(self) -> int:
        """Bytes held now, scratch included."""
        tensors = [*self.k_RNMD, *self.v_RNMD, self.scratch_k_RNMD, self.scratch_v_RNMD]
        return sum(t.numel() * t.element_size() for t in tensors)

    def keep(self, rows: Sequence[int]) -> None:
        """Releases all other rows, block by block."""
        index = numbers(rows, self.scratch_k_RNMD.device)
        # The scratch holds nothing between two scales. Giving it back first keeps the copies below the bound: it is at
        # least as large as any block.
        heads, behind, width = self.scratch_k_RNMD.shape[1:]
        empty = self.scratch_k_RNMD.new_empty
        self.scratch_k_RNMD = self.scratch_v_RNMD = empty(0)
        for block in range(len(self.lengths)):
            self.k_RNMD[block] = self.k_RNMD[block][index]
            self.v_RNMD[block] = self.v_RNMD[block][index]
            self.lengths[block] = [self.lengths[block][r] for r in rows]
        self.scratch_k_RNMD = empty(len(rows), heads, behind, width)
        self.scratch_v_RNMD = empty(len(rows), heads, behind, width)

    def slot(self, block: int, rows: Rows, is_stored: bool) -> "Slot":
        """The place where one block of one scale writes and reads."""
        return Slot(self, block, rows, is_stored)


class Slot:
    """One block's view of the cache at one scale (`core.protocols.KVSlot`)."""

    def __init__(self, cache: KVCache, block: int, rows: Rows, is_stored: bool) -> None:
        self.cache, self.block, self.rows, self.is_stored = cache, block, rows, is_stored

    def _buffers(self, a: int, b: int, filled: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows a..b up to `end`, the first `filled` of them in place."""
        k_gNMD, v_gNMD = self.cache.k_RNMD[self.block][a:b], self.cache.v_RNMD[self.block][a:b]
        if self.is_stored:
            return k_gNMD[:, :, :end], v_gNMD[:, :, :end]
        own_k, own_v = self.cache.scratch_k_RNMD[a:b, :, :end], self.cache.scratch_v_RNMD[a:b, :, :end]
        own_k[:, :, :filled] = k_gNMD[:, :, :filled]
        own_v[:, :, :filled] = v_gNMD[:, :, :filled]
        return own_k, own_v

    def attend(
        self,
        q_nND: Float[Tensor, "n N D"],
        k_nND: Float[Tensor, "n N D"],
        v_nND: Float[Tensor, "n N D"],
        scale: float,
    ) -> Float[Tensor, "n N D"]:
        """Adds keys and values of these tokens and attends to all that each row holds."""
        lengths, parts = self.cache.lengths[self.block], []
        for a, b in self.rows.groups(tuple(lengths)):
            count, filled = self.rows.counts[a], lengths[a]
            if not count:
                continue
            tokens = slice(self.rows.starts[a], self.rows.starts[b])
            k_gNmD, v_gNmD = self._buffers(a, b, filled, filled + count)
            k_gNmD[:, :, filled:] = k_nND[tokens].unflatten(0, (b - a, count)).transpose(1, 2)
            v_gNmD[:, :, filled:] = v_nND[tokens].unflatten(0, (b - a, count)).transpose(1, 2)
            parts.append(attend_group(q_nND[tokens], k_gNmD, v_gNmD, scale))
        if self.is_stored:
            self.cache.lengths[self.block] = [m + n for m, n in zip(lengths, self.rows.counts, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
