"""Bilinear resizing of token maps (`align_corners=False`), alone or added to hidden states.

Axes: R rows, l tokens of the source, m tokens of the target, C width, (h, w) the target grid, (y, x) the source grid.
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.kernels import native


@functools.lru_cache(maxsize=256)
def neighbours(size: int, source: int, device: torch.device) -> tuple[Int[Tensor, " size"], Float[Tensor, " size"]]:
    """For each of `size` samples the one of `source` samples in front of it, and the share of the next, float32.

    The blocks of a scale ask for the same, so it is remembered, as is the matrix.
    """
    centre = ((torch.arange(size, device=device, dtype=torch.float64) + 0.5) * source / size - 0.5).clamp_min(0)
    low = centre.floor().long().clamp_max(source - 1)
    return low, (centre - low).float()


@functools.lru_cache(maxsize=256)
def resize_matrix(size: int, source: int, device: torch.device) -> Float[Tensor, "size source"]:
    """The same weights as a float32 matrix."""
    low, share = neighbours(size, source, device)
    matrix = torch.zeros(size, source, dtype=torch.float32, device=device)
    matrix.scatter_add_(1, low[:, None], (1 - share)[:, None])
    matrix.scatter_add_(1, (low + 1).clamp_max(source - 1)[:, None], share[:, None])
    return matrix


def resize_tokens(tokens_RlC: Float[Tensor, "R l C"], source: Grid, grid: Grid) -> Float[Tensor, "R m C"]:
    """Resizes token maps; elsewhere than in C with two small matmuls, in the maps' dtype."""
    if source == grid:
        return tokens_RlC
    num_rows, _, width = tokens_RlC.shape
    if tokens_RlC.is_contiguous() and native.serves(tokens_RlC):
        resized_RmC = tokens_RlC.new_empty(num_rows, grid[0] * grid[1], width)
        _native(tokens_RlC, source, grid, resized_RmC, adds=False)
        return resized_RmC
    rows_hy = resize_matrix(grid[0], source[0], tokens_RlC.device).to(tokens_RlC.dtype)
    columns_wx = resize_matrix(grid[1], source[1], tokens_RlC.device).to(tokens_RlC.dtype)
    tall = torch.matmul(rows_hy, tokens_RlC.view(num_rows, source[0], source[1] * width))
    return torch.matmul(columns_wx, tall.view(num_rows, grid[0], source[1], width)).view(num_rows, -1, width)


def add_resized_(x_nC: Float[Tensor, "n C"], tokens_RlC: Float[Tensor, "R l C"], source: Grid, grid: Grid) -> None:
    """Adds `resize_tokens(...)`, row after row, to float32 hidden states of all tokens of the target; in place."""
    if x_nC.is_contiguous() and tokens_RlC.is_contiguous() and native.serves(x_nC, tokens_RlC):
        _native(tokens_RlC, source, grid, x_nC, adds=True)
    else:
        x_nC += resize_tokens(tokens_RlC, source, grid).flatten(0, 1)


def _native(tokens_RlC: Float[Tensor, "R l C"], source: Grid, grid: Grid, target: Tensor, *, adds: bool) -> None:
    library = native.loaded()
    row_low, row_share = neighbours(grid[0], source[0], tokens_RlC.device)
    column_low, column_share = neighbours(grid[1], source[1], tokens_RlC.device)
    library.foveate_resize(
        tokens_RlC.data_ptr(),
        native.dtype_code(tokens_RlC),
        *source,
        target.data_ptr(),
        int(adds),
        tokens_RlC.shape[0],
        *grid,
        tokens_RlC.shape[-1],
        row_low.data_ptr(),
        row_share.data_ptr(),
        column_low.data_ptr(),
        column_share.data_ptr(),
        native.num_threads(target.numel()),
    )
