"""Records what the policy asked for while the blocks of one scale run, and fills skipped blocks from what was recorded.

Axes: B images, R rows, n packed tokens, a tokens that run a block, l tokens of the scale, C width, V outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.schedule import Grid
from foveate.core.signals import BranchLogits, Signal
from foveate.engine.deltas import DeltaStore
from foveate.engine.select import TokenLayout
from foveate.kernels.residual import add_gated_


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Deltas of the running scale; they replace the stored ones when the scale is done."""

    wanted: frozenset[Signal]
    store: DeltaStore
    layout: TokenLayout
    grid: Grid
    dtype: torch.dtype
    fresh: list[Tensor] = field(default_factory=list)
    change_sum_Bl: Tensor | None = None

    @property
    def is_on(self) -> bool:
        """Whether block deltas are needed at all."""
        return bool(self.wanted & {Signal.BLOCK_CHANGE, Signal.BLOCK_DELTAS})

    def fill_(self, block: int, x_nC: Float[Tensor, "n C"]) -> Float[Tensor, "n C"] | None:
        """Adds the stored deltas of a block to all packed tokens, in place; returns them where `record` needs them."""
        if self.layout.kept is None and not self.is_on:
            self.store.add_resized_(block, self.grid, x_nC)
            return None
        fill_nC = self._fill(block)
        if fill_nC is not None:
            add_gated_(x_nC, fill_nC, None, self.layout.rows)
        return fill_nC

    def _fill(self, block: int) -> Float[Tensor, "n C"] | None:
        """The stored deltas of a block for all packed tokens of this scale; None before anything was recorded."""
        resized_RlC = self.store.resized(block, self.grid)
        if resized_RlC is None:
            return None
        if self.layout.kept is None:
            return resized_RlC.flatten(0, 1)
        return torch.cat(
            [row[self.layout.kept[image]] for row, (image, _) in zip(resized_RlC, self.layout.live, strict=True)]
        )

    def record(
        self,
        block: int,
        delta_aC: Float[Tensor, "a C"],
        index_a: Int[Tensor, " a"] | None,
        fill_nC: Float[Tensor, "n C"] | None,
    ) -> None:
        """Completes a block's deltas to the whole grid and keeps what was asked for."""
        delta_nC = delta_aC.to(self.dtype)
        if index_a is not None:
            total = self.layout.rows.total
            whole = delta_nC.new_zeros(total, delta_nC.shape[-1]) if fill_nC is None else fill_nC.to(self.dtype).clone()
            whole[index_a] = delta_nC
            delta_nC = whole
        delta_RlC = self._on_grid(block, delta_nC)
        if Signal.BLOCK_DELTAS in self.wanted:
            self.fresh.append(delta_RlC)
        if Signal.BLOCK_CHANGE in self.wanted:
            num_cond = sum(is_cond for _, is_cond in self.layout.live)
            change_Bl = delta_RlC[:num_cond].abs().mean(-1, dtype=torch.float32)
            self.change_sum_Bl = change_Bl if self.change_sum_Bl is None else self.change_sum_Bl + change_Bl

    def _on_grid(self, block: int, delta_nC: Float[Tensor, "n C"]) -> Float[Tensor, "R l C"]:
        """Packed deltas on the whole grid; dropped tokens take the resized stored ones, or zero."""
        num_rows, num_tokens = len(self.layout.live), self.layout.num_tokens
        if self.layout.kept is None:
            return delta_nC.view(num_rows, num_tokens, -1)
        resized_RlC = self.store.resized(block, self.grid)
        if resized_RlC is None:
            whole_RlC = delta_nC.new_zeros(num_rows, num_tokens, delta_nC.shape[-1])
        else:
            whole_RlC = resized_RlC.clone()
        for r, (part, (image, _)) in enumerate(
            zip(delta_nC.split(self.layout.rows.counts), self.layout.live, strict=True)
        ):
            whole_RlC[r, self.layout.kept[image]] = part
        return whole_RlC

    def finish(self) -> Float[Tensor, "B l"] | None:
        """Stores the deltas of the scale; returns the summed change per token if it was asked for."""
        if Signal.BLOCK_DELTAS in self.wanted:
            self.store.blocks = list(self.fresh)
            self.store.grid = self.grid
        return self.change_sum_Bl


def branch_logits(logits: Mapping[Row, Float[Tensor, "_k V"]], num_images: int) -> tuple[BranchLogits | None, ...]:
    """Both branches' logits per image, None where only one ran."""
    return tuple(
        BranchLogits(cond_kV=logits[(image, True)], uncond_kV=logits[(image, False)])
        if (image, False) in logits
        else None
        for image in range(num_images)
    )
