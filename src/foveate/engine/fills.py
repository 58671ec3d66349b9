"""What blocks or sublayers added to each token at a kept scale, and cond - uncond of one: for fills and for guidance.

Axes: R rows, l tokens, C width, (h, w) the grid of the coming scale, (y, x) that of the kept one, B images, W width of
the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.plan import CachedFill, Resize
from foveate.core.schedule import Grid
from foveate.core.transfer import numbers
from foveate.kernels.resize import add_resized_, resize_tokens

Key = tuple[int, int | None]
"""A block, and one of its sublayers or None for the whole of it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fills:
    """Outputs of one scale, (R, l, C) each in the compute dtype; a value that is replaced and never changed."""

    scale: int = -1
    grid: Grid = (1, 1)
    outputs: Mapping[Key, Float[Tensor, "R l C"]] = field(default_factory=dict)

    def resized(self, key: Key, fill: CachedFill, grid: Grid) -> Float[Tensor, "R m C"] | None:
        """Outputs on another grid; None if nothing was kept yet.

        Raises:
            PlanConflictError: The fill names a scale that was not kept, or did not run.
        """
        stored_RlC = self._stored(key, fill)
        if stored_RlC is None:
            return None
        if fill.resize is Resize.BILINEAR:
            return resize_tokens(stored_RlC, self.grid, grid)
        map_RChw = stored_RlC.transpose(1, 2).unflatten(-1, self.grid)
        return F.interpolate(map_RChw, size=grid, mode=fill.resize.value).flatten(2).transpose(1, 2)

    def add_resized_(self, key: Key, fill: CachedFill, grid: Grid, x_nC: Float[Tensor, "n C"]) -> None:
        """Adds outputs on another grid to the hidden states of all its tokens, if anything was kept; in place."""
        stored_RlC = self._stored(key, fill)
        if stored_RlC is None:
            return
        if fill.resize is Resize.BILINEAR:
            add_resized_(x_nC, stored_RlC, self.grid, grid)
            return
        resized_RmC = self.resized(key, fill, grid)
        assert resized_RmC is not None, "it is stored"
        x_nC += resized_RmC.flatten(0, 1)

    def _stored(self, key: Key, fill: CachedFill) -> Float[Tensor, "R l C"] | None:
        if fill.source is not None and fill.source != self.scale:
            kept = "nothing is kept" if self.scale < 0 else f"scale {self.scale} is kept"
            raise PlanConflictError(f"a fill reads scale {fill.source}, but {kept}; it must run and be kept")
        return self.outputs.get(key)

    def of_rows(self, rows: Sequence[int]) -> "Fills":
        """Outputs of some rows."""
        if not self.outputs:
            return self
        index = numbers(rows, next(iter(self.outputs.values())).device)
        return Fills(scale=self.scale, grid=self.grid, outputs={k: out[index] for k, out in self.outputs.items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Difference:
    """cond - uncond of a scale that ran both branches, zero where one did not: head inputs or logits, float32."""

    grid: Grid
    map_BlW: Float[Tensor, "B l W"]

    def resized(self, grid: Grid) -> Float[Tensor, "B m W"]:
        """The same on another grid, bilinearly."""
        return resize_tokens(self.map_BlW, self.grid, grid)


def nearest_ran(keep_Bl: Tensor, grid: Grid) -> Tensor:
    """For every token the index of the nearest one that ran, in grid steps, ties by index; (B, l) int64.

    Kept tokens are their own. Where no token ran it is token 0. Distances are exact integers.
    """
    num_images, num_tokens = keep_Bl.shape
    y_l = torch.arange(num_tokens, device=keep_Bl.device) // grid[1]
    x_l = torch.arange(num_tokens, device=keep_Bl.device) % grid[1]
    nearest = []
    for keep_l in keep_Bl:
        # Row by row of the grid, so that no (l, l) map of a large scale stands in memory at once.
        rows = []
        for first in range(0, num_tokens, grid[1]):
            part = slice(first, first + grid[1])
            distance = (y_l[part, None] - y_l) ** 2 + (x_l[part, None] - x_l) ** 2
            rows.append(distance.masked_fill(~keep_l, 2**40).argmin(-1))
        nearest.append(torch.cat(rows))
    return torch.stack(nearest).view(num_images, num_tokens)
