"""Slow twins of lattices: threshold matrices by their recursion, and the tokens of the lowest thresholds."""

import math


def bayer(size: int) -> list[list[int]]:
    """The threshold matrix by its recursion: four copies of the smaller one, times 4, plus 0 2 / 3 1."""
    if size == 1:
        return [[0]]
    small, half = bayer(size // 2), size // 2
    add = ((0, 2), (3, 1))
    return [[4 * small[y % half][x % half] + add[y // half][x // half] for x in range(size)] for y in range(size)]


def lowest(grid: tuple[int, int], ratio: float, kept: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The share of the kept tokens with the lowest thresholds."""
    size = 1
    while size < max(grid):
        size *= 2
    matrix = bayer(size)
    kept = tuple(range(grid[0] * grid[1])) if kept is None else kept
    ranked = sorted(kept, key=lambda t: matrix[t // grid[1]][t % grid[1]])
    return tuple(sorted(ranked[: math.ceil(ratio * len(kept) - 1e-9)]))
