"""Per-block changes of the latest recorded scale, for fills and for scores.

Axes: R rows, l tokens, C width, (h, w) the grid of the coming scale, (y, x) that of the recorded one.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.core.transfer import numbers
from foveate.kernels.resize import add_resized_, resize_tokens


class DeltaStore:
    """What each block added to each token at the latest recorded scale; (R, l, C) per block in the compute dtype."""

    def __init__(self, num_blocks: int) -> None:
        self.grid: Grid | None = None
        self.blocks: list[Tensor | None] = [None] * num_blocks

    def resized(self, block: int, grid: Grid) -> Float[Tensor, "R m C"] | None:
        """A block's deltas on another grid, or None if nothing was recorded."""
        stored = self.blocks[block]
        if stored is None or self.grid is None:
            return None
        return resize_tokens(stored, self.grid, grid)

    def add_resized_(self, block: int, grid: Grid, x_nC: Float[Tensor, "n C"]) -> None:
        """Adds a block's deltas on another grid to the hidden states of all its tokens, if anything was recorded."""
        stored = self.blocks[block]
        if stored is not None and self.grid is not None:
            add_resized_(x_nC, stored, self.grid, grid)

    def keep(self, rows: Sequence[int]) -> None:
        """Releases all other rows."""
        held = [stored for stored in self.blocks if stored is not None]
        if held:
            index = numbers(rows, held[0].device)
            self.blocks = [None if stored is None else stored[index] for stored in self.blocks]
