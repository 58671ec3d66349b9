"""Lattices of tokens: spread evenly at every share, the same for every image, known before the run.

The order is that of an ordered dither (Bayer 1973). Axes: l tokens of a scale.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.core.selection import Rule, TokenSelection


def dither_rank(grid: Grid) -> Int[Tensor, " l"]:
    """Thresholds of a Bayer matrix that covers the grid: no two are equal, neighbouring ones lie far apart.

    The lowest quarter has even rows and columns, the lowest half is a checkerboard.
    """
    y_l = torch.arange(grid[0], device="cpu").repeat_interleave(grid[1])
    x_l = torch.arange(grid[1], device="cpu").repeat(grid[0])
    rank_l = torch.zeros_like(y_l)
    for bit in range((max(grid) - 1).bit_length()):
        rank_l = 4 * rank_l + 2 * ((x_l ^ y_l) >> bit & 1) + (y_l >> bit & 1)
    return rank_l


def lowest(rank_l: Int[Tensor, " l"], share: float) -> TokenSelection:
    """The tokens of the lowest ranks, among those that other parts of a composition keep; their count is known."""
    return TokenSelection(score_Bl=-rank_l[None].double(), share=share, rule=Rule.COUNT)
