"""Counts what ran at one scale, from the lists of tokens that its blocks were given.

Axes: B images, n packed tokens, l tokens of the scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.cost import Row, RowWork, ScaleWork
from foveate.core.schedule import Scale
from foveate.core.trace import ScaleTrace
from foveate.engine.select import TokenLayout


@dataclass(kw_only=True, slots=True)
class Tally:
    """Tokens per block and row, and with maps the blocks that each packed token ran."""

    layout: TokenLayout
    depth_n: Int[Tensor, " n"] | None
    counts: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def start(cls, layout: TokenLayout, wants_maps: bool, device: torch.device) -> "Tally":
        """Begins a scale."""
        depth_n = torch.zeros(layout.rows.total, dtype=torch.long, device=device) if wants_maps else None
        return cls(layout=layout, depth_n=depth_n)

    def count(self) -> None:
        """Notes which tokens ran each block."""
        for block, counts in enumerate(self.layout.block_counts):
            self.counts.append(counts)
            if self.depth_n is not None:
                index_n = self.layout.active(block).index_n
                self.depth_n[slice(None) if index_n is None else index_n] += 1

    def trace(self, scale: Scale, head_tokens: Mapping[Row, int]) -> ScaleTrace:
        """The scale as the trace keeps it; its time is filled in by the loop."""
        rows = {
            row: RowWork(block_tokens=tuple(counts[r] for counts in self.counts), head_tokens=head_tokens.get(row, 0))
            for r, row in enumerate(self.layout.live)
        }
        keep_Bl, depth_Bl = self._maps(scale)
        return ScaleTrace(
            scale=scale.index,
            grid=scale.grid,
            ran=True,
            work=ScaleWork(scale=scale.index, grid_tokens=scale.num_tokens, rows=rows),
            keep_Bl=keep_Bl,
            depth_Bl=depth_Bl,
        )

    def _maps(self, scale: Scale) -> tuple[Tensor | None, Tensor | None]:
        """Kept tokens and depths of the conditional rows, on the host: maps wait for the device."""
        if self.depth_n is None:
            return None, None
        num_images = sum(is_cond for _, is_cond in self.layout.live)
        parts = self.depth_n.split(self.layout.rows.counts)[:num_images]
        if self.layout.kept is None or self.layout.keep_Bl is None:
            return torch.ones(num_images, scale.num_tokens, dtype=torch.bool), torch.stack(parts).cpu()
        depth_Bl = self.depth_n.new_zeros(num_images, scale.num_tokens)
        for depth_l, kept_k, part_k in zip(depth_Bl, self.layout.kept, parts, strict=True):
            depth_l[kept_k] = part_k
        return self.layout.keep_Bl.cpu().clone(), depth_Bl.cpu()


def skipped(scale: Scale) -> ScaleTrace:
    """A scale that a plan does not run."""
    work = ScaleWork(scale=scale.index, grid_tokens=0, rows={})
    return ScaleTrace(scale=scale.index, grid=scale.grid, ran=False, work=work)
