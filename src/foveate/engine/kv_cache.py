"""Keys and values of earlier scales: allocated once at a known bound, owned by one request.

Layout per block: (R, N, M, D) in the compute dtype, M the bound of that block. The last scale is never stored: its own
keys lie behind a copy of the earlier ones in one scratch that all blocks share. What a scale writes counts only when it
is committed, so a scale that fails leaves the cache as it was.
Axes: R rows, N heads, M tokens at most, D head width, n packed tokens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.rows import Rows
from foveate.core.transfer import numbers
from foveate.kernels.attention import attend_group, attend_group_copies, entropy


class KVCache:
    """The cache of a request; nothing of it is stored on a module.

    Attributes:
        lengths: Per block, the tokens that each row holds.
        scales: What was committed, oldest first: a scale and, per block, its tokens of each row.
    """

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
            scratch_tokens: Most tokens of a row at a scale that is not stored.
            dtype: Compute dtype.
            device: Where.
        """
        self.num_heads, self.head_width = shape.num_heads, shape.head_width
        self.num_rows, self.dtype, self.device = num_rows, dtype, device
        self.k_RNMD = [self._empty(tokens) for tokens in capacities]
        self.v_RNMD = [self._empty(tokens) for tokens in capacities]
        self.lengths = [[0] * num_rows for _ in capacities]
        self.scales: list[tuple[int, list[list[int]]]] = []
        self.behind = max(capacities, default=0) + scratch_tokens
        self.scratch_k_RNMD, self.scratch_v_RNMD = self._empty(self.behind), self._empty(self.behind)

    def _empty(self, tokens: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(
            self.num_rows, self.num_heads, tokens, self.head_width, dtype=dtype or self.dtype, device=self.device
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held now, scratch included."""
        tensors = [*self.k_RNMD, *self.v_RNMD, self.scratch_k_RNMD, self.scratch_v_RNMD]
        return sum(t.numel() * t.element_size() for t in tensors)

    def scratch(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The shared buffers for keys and values; those of another dtype lie in the memory of the cache's own."""
        if dtype == self.dtype:
            return self.scratch_k_RNMD, self.scratch_v_RNMD
        if dtype.itemsize > self.dtype.itemsize:
            return self._empty(self.behind, dtype), self._empty(self.behind, dtype)
        shape = self.scratch_k_RNMD.shape
        narrow_k, narrow_v = (
            full.view(-1).view(dtype)[: full.numel()].view(shape) for full in (self.scratch_k_RNMD, self.scratch_v_RNMD)
        )
        return narrow_k, narrow_v

    def commit(self, scale: int, counts: Sequence[Sequence[int]]) -> None:
        """Counts what a scale has written, per block and row of the cache, as held."""
        self.scales.append((scale, [list(block) for block in counts]))
        for lengths, added in zip(self.lengths, counts, strict=True):
            for row, count in enumerate(added):
                lengths[row] += count

    def evict(self, scale: int) -> bool:
        """Removes a scale's keys and values, later ones move up; returns whether there were any."""
        place = next((i for i, (index, _) in enumerate(self.scales) if index == scale), None)
        if place is None:
            return False
        _, gone = self.scales.pop(place)
        for block, lengths in enumerate(self.lengths):
            for row, count in enumerate(gone[block]):
                first = sum(counts[block][row] for _, counts in self.scales[:place])
                for stored in (self.k_RNMD[block][row], self.v_RNMD[block][row]):
                    stored[:, first : lengths[row] - count] = stored[:, first + count : lengths[row]].clone()
                lengths[row] -= count
        return True

    def keep(self, rows: Sequence[int]) -> None:
        """Releases all other rows, block by block."""
        index = numbers(rows, self.device)
        # The scratch holds nothing between two scales. Giving it back first keeps the copies below the bound: it is at
        # least as large as any block.
        self.scratch_k_RNMD = self.scratch_v_RNMD = self.scratch_k_RNMD.new_empty(0)
        for block in range(len(self.lengths)):
            self.k_RNMD[block] = self.k_RNMD[block][index]
            self.v_RNMD[block] = self.v_RNMD[block][index]
            self.lengths[block] = [self.lengths[block][r] for r in rows]
        self.scales = [(scale, [[block[r] for r in rows] for block in counts]) for scale, counts in self.scales]
        self.num_rows = len(rows)
        self.scratch_k_RNMD, self.scratch_v_RNMD = self._empty(self.behind), self._empty(self.behind)


class Slot:
    """One block's view of the cache at one scale (`core.protocols.KVSlot`)."""

    def __init__(
        self, cache: KVCache, block: int, rows: Rows, places: Sequence[int], *, is_stored: bool, wants_entropy: bool
    ) -> None:
        """Writes nothing yet.

        Args:
            cache: Of the request.
            block: Its index.
            rows: The tokens that attend.
            places: For each of these rows, the row of the cache.
            is_stored: Whether later scales read what is written.
            wants_entropy: Whether `attend` computes the attention's entropy.
        """
        self.cache, self.block, self.rows, self.places = cache, block, rows, tuple(places)
        self.is_stored, self.wants_entropy = is_stored, wants_entropy
        self.entropy_n: Float[Tensor, " n"] | None = None

    def _buffers(self, a: int, b: int, filled: int, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of rows a..b of the cache, those of this scale behind the `filled` that are there."""
        end = filled + own[0].shape[2]
        parts = []
        stores = (self.cache.k_RNMD[self.block], self.cache.v_RNMD[self.block])
        for store, scratch, own_gNmD in zip(stores, self.cache.scratch(own[0].dtype), own, strict=True):
            read = store if self.is_stored and own_gNmD.dtype == self.cache.dtype else scratch
            if read is scratch:
                read[a:b, :, :filled] = store[a:b, :, :filled]
            if read is scratch and self.is_stored:
                store[a:b, :, filled:end] = own_gNmD
            read[a:b, :, filled:end] = own_gNmD
            parts.append(read[a:b, :, :end])
        return parts[0], parts[1]

    def attend(
        self,
        q_nND: Float[Tensor, "n N D"],
        k_nND: Float[Tensor, "n N D"],
        v_nND: Float[Tensor, "n N D"],
        scale: float,
        first_copies: Sequence[int] = (),
    ) -> Float[Tensor, "n N D"]:
        """Writes keys and values of these tokens and attends to all that each row holds."""
        lengths, parts, entropies = self.cache.lengths[self.block], [], []
        held = tuple(lengths[place] for place in self.places)
        shifts = tuple(place - r for r, place in enumerate(self.places))
        copies = tuple(first_copies) or (1,) * len(self.places)
        for a, b in self.rows.groups(held, shifts, copies):
            count = self.rows.counts[a]
            if not count:
                continue
            tokens = slice(self.rows.starts[a], self.rows.starts[b])
            k_gNmD, v_gNmD = (part[tokens].unflatten(0, (b - a, count)).transpose(1, 2) for part in (k_nND, v_nND))
            first = self.places[a]
            k_gNmD, v_gNmD = self._buffers(first, first + b - a, held[a], (k_gNmD, v_gNmD))
            if copies[a] == 1:
                parts.append(attend_group(q_nND[tokens], k_gNmD, v_gNmD, scale))
            else:
                parts.append(attend_group_copies(q_nND[tokens], k_gNmD, v_gNmD, scale, copies[a]))
            if self.wants_entropy:
                # In bfloat16 the rounded mean key would decide the order of tokens.
                entropies.append(entropy(q_nND[tokens].float(), k_gNmD.float(), scale).mean(-1))
        self.entropy_n = torch.cat(entropies) if entropies else None
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class JoinedSlot:
    """Slots of several requests as one: each attends to its own cache, by itself."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)

    def attend(
        self,
        q_nND: Float[Tensor, "n N D"],
        k_nND: Float[Tensor, "n N D"],
        v_nND: Float[Tensor, "n N D"],
        scale: float,
        first_copies: Sequence[int] = (),
    ) -> Float[Tensor, "n N D"]:
        """Attends request by request."""
        totals = [slot.rows.total for slot in self.slots]
        packed = zip(self.slots, q_nND.split(totals), k_nND.split(totals), v_nND.split(totals), strict=True)
        parts, first = [], 0
        for slot, q, k, v in packed:
            own = first_copies[first : first + len(slot.places)]
            first += len(slot.places)
            if slot.rows.total:
                parts.append(slot.attend(q, k, v, scale, own))
        return torch.cat(parts)
