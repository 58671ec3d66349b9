"""Ordered dither against its recursion, and the lattices that it is known for."""

import pytest
import torch

from foveate.policies.lattice import dither_rank
from tests.policies.lattices import bayer


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (5, 3), (8, 8), (9, 14)])
def test_dither_equals_the_recursion(grid: tuple[int, int]):
    size = 1
    while size < max(grid):
        size *= 2
    matrix = bayer(size)
    assert dither_rank(grid).tolist() == [matrix[y][x] for y in range(grid[0]) for x in range(grid[1])]
    assert len(set(dither_rank(grid).tolist())) == grid[0] * grid[1]


def test_quarter_and_half_are_lattices():
    rank = dither_rank((16, 16)).view(16, 16)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    assert torch.equal(rank < 64, (y % 2 == 0) & (x % 2 == 0))
    assert torch.equal(rank < 128, (y + x) % 2 == 0)
