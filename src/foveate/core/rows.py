"""How the tokens of several rows lie in one packed list.

A row is one image in one branch. Everything in front of, between and behind the attentions works on a packed list
`x_nC` of all tokens of all rows, row after row, so rows may differ in how many tokens they hold and nothing is padded.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.transfer import numbers


@dataclass(frozen=True)
class Rows:
    """Token counts of the rows of a packed list."""

    counts: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        """Number of tokens of all rows."""
        return sum(self.counts)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each row begins, and the total at the end."""
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        return tuple(starts)

    @cached_property
    def uniform(self) -> int | None:
        """The common count if all rows have the same one, else None."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    def row_of_token(self, device: torch.device) -> Int[Tensor, " n"]:
        """The row that each token belongs to; built once per device, without waiting for it."""
        if device not in self._lookups:
            rows = torch.arange(len(self.counts), device=device)
            counts = numbers(self.counts, device)
            self._lookups[device] = torch.repeat_interleave(rows, counts, output_size=self.total)
        return self._lookups[device]

    @cached_property
    def _lookups(self) -> dict[torch.device, Tensor]:
        """What `row_of_token` has built."""
        return {}

    def spread(self, per_row_RC: Float[Tensor, "R C"]) -> Float[Tensor, "n C"]:
        """Repeats one vector per row for each of its tokens; a view where the rows allow it."""
        if len(self.counts) == 1:
            return per_row_RC.expand(self.total, -1)
        if self.uniform is not None:
            return per_row_RC[:, None].expand(-1, self.uniform, -1).reshape(self.total, -1)
        return per_row_RC[self.row_of_token(per_row_RC.device)]

    def groups(self, *keys: tuple[int, ...]) -> list[tuple[int, int]]:
        """Runs of neighbouring rows that agree in their count and in every given key; (first row, row behind)."""
        tags = list(zip(self.counts, *keys, strict=True))
        groups: list[tuple[int, int]] = []
        for _, members in groupby(range(len(tags)), key=lambda r: tags[r]):
            indices = list(members)
            groups.append((indices[0], indices[-1] + 1))
        return groups
