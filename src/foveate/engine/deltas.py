"""Per-block changes of the latest recorded scale, for fills and for scores.

Axes: R rows, l tokens, C width, (h, w) the grid of the coming scale, (y, x) that of the recorded one.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.core.transfer import numbers


def resize_matrix(size: int, source: int, device: torch.device) -> Float[Tensor, "size source"]:
    """Bilinear weights (`align_corners=False`) from `source` to `size` samples, as a float32 matrix."""
    centre = ((torch.arange(size, device=device, dtype=torch.float64) + 0.5) * source / size - 0.5).clamp_min(0)
    low = centre.floor().long().clamp_max(source - 1)
    share = centre - low
    matrix = torch.zeros(size, source, device=device, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (low + 1).clamp_max(source - 1)[:, None], share[:, None])
    return matrix.float()


def resize_matrices(
    source: Grid, grid: Grid, like: Float[Tensor, "R l C"]
) -> tuple[Float[Tensor, "h y"], Float[Tensor, "w x"]]:
    """The two matrices of `resize_tokens`, where and in which dtype the maps are."""
    rows_hy = resize_matrix(grid[0], source[0], like.device).to(like.dtype)
    columns_wx = resize_matrix(grid[1], source[1], like.device).to(like.dtype)
    return rows_hy, columns_wx


def resize_tokens(
    tokens_RlC: Float[Tensor, "R l C"], rows_hy: Float[Tensor, "h y"], columns_wx: Float[Tensor, "w x"]
) -> Float[Tensor, "R m C"]:
    """Resizes token maps (y, x) to (h, w) with two small matrix products, in the maps' dtype."""
    num_rows, _, width = tokens_RlC.shape
    (num_h, num_y), (num_w, num_x) = rows_hy.shape, columns_wx.shape
    tall = torch.matmul(rows_hy, tokens_RlC.view(num_rows, num_y, num_x * width))
    return torch.matmul(columns_wx, tall.view(num_rows, num_h, num_x, width)).view(num_rows, num_h * num_w, width)


class DeltaStore:
    """What each block added to each token at the latest recorded scale; (R, l, C) per block in the compute dtype."""

    def __init__(self, num_blocks: int) -> None:
        self.grid: Grid | None = None
        self.blocks: list[Tensor | None] = [None] * num_blocks
        self._matrices: dict[tuple[Grid, Grid], tuple[Tensor, Tensor]] = {}

    def resized(self, block: int, grid: Grid) -> Float[Tensor, "R m C"] | None:
        """A block's deltas on another grid, or None if nothing was recorded."""
        stored = self.blocks[block]
        if stored is None or self.grid is None:
            return None
        if self.grid == grid:
            return stored
        # The blocks of a scale share the matrices: many small operations, once.
        if (self.grid, grid) not in self._matrices:
            self._matrices[(self.grid, grid)] = resize_matrices(self.grid, grid, stored)
        return resize_tokens(stored, *self._matrices[(self.grid, grid)])

    def keep(self, rows: Sequence[int]) -> None:
        """Releases all other rows."""
        held = [stored for stored in self.blocks if stored is not None]
        if held:
            index = numbers(rows, held[0].device)
            self.blocks = [None if stored is None else stored[index] for stored in self.blocks]
