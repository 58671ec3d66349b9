"""The ordered grids of a generation, and the sizes that the published models know.

A scale is one step of next-scale prediction; its grid (h, w) counts tokens. With `patch` = 2 a token stands for 2x2
latents (spatial patchify). Grids of the 15 published aspect ratios: Infinity (arXiv 2412.04431).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from foveate.core.errors import FoveateError

Grid = tuple[int, int]

_TALL: dict[float, tuple[Grid, ...]] = {
    1.000: tuple((n, n) for n in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)),
    1.250: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36),
            (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36),
            (60, 45), (72, 54)),
    1.500: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32),
            (63, 42), (78, 52)),
    1.750: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32),
            (70, 40), (84, 48)),
    2.000: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30),
            (74, 37), (90, 45)),
    2.500: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26),
            (80, 32), (100, 40)),
    3.000: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24),
            (90, 30), (111, 37)),
}  # fmt: skip

TEMPLATES: dict[float, tuple[Grid, ...]] = dict(_TALL) | {
    int(1000 / ratio) / 1000: tuple((w, h) for h, w in grids) for ratio, grids in _TALL.items() if ratio > 1
}
"""Grids of all 13 scales per height / width."""

BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Number of scales per pixel budget."""

_RATIO_NAMES: dict[float, str] = {
    1.0: "1:1", 1.25: "4:5", 1.333: "3:4", 1.5: "2:3", 1.75: "4:7", 2.0: "1:2", 2.5: "2:5", 3.0: "1:3",
    0.8: "5:4", 0.75: "4:3", 0.666: "3:2", 0.571: "7:4", 0.5: "2:1", 0.4: "5:2", 0.333: "3:1",
}  # fmt: skip
"""Width:height as users write it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One step: its index in the full schedule and its token grid."""

    index: int
    grid: Grid

    @property
    def num_tokens(self) -> int:
        """Tokens of the grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSchedule:
    """All grids of a generation, coarse to fine.

    `finest` is the grid that rotary positions are scaled to (the largest published grid of the aspect ratio, whatever
    the budget); `patch` latents along a side of a token.
    """

    grids: tuple[Grid, ...]
    finest: Grid
    patch: int = 1

    def __post_init__(self) -> None:
        """Refuses schedules that shrink."""
        if not self.grids:
            raise FoveateError("a schedule needs at least one grid, got none")
        for before, after in pairwise(self.grids):
            if after[0] < before[0] or after[1] < before[1]:
                raise FoveateError(f"grids must not shrink, got {before} before {after}")

    def __len__(self) -> int:
        """Number of scales."""
        return len(self.grids)

    @property
    def scales(self) -> tuple[Scale, ...]:
        """The scales in order."""
        return tuple(Scale(index=i, grid=grid) for i, grid in enumerate(self.grids))

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales of one image in one branch."""
        return sum(h * w for h, w in self.grids)

    def latent_grid(self, scale: int) -> Grid:
        """Grid of the latents behind the tokens of a scale."""
        h, w = self.grids[scale]
        return (h * self.patch, w * self.patch)

    @classmethod
    def from_grids(cls, grids: Sequence[Grid], finest: Grid | None = None, patch: int = 1) -> "ScaleSchedule":
        """A schedule of any grids; `finest` is that of the template that begins like it or holds its last grid."""
        known = tuple((int(h), int(w)) for h, w in grids)
        if finest is None:
            alike = [template[-1] for template in TEMPLATES.values() if template[: len(known)] == known]
            ending = [template[-1] for template in TEMPLATES.values() if known[-1:] and known[-1] in template]
            finest = (alike or ending or known[-1:])[0]
        return cls(grids=known, finest=finest, patch=patch)

    @classmethod
    def from_template(cls, height_over_width: float, budget: str, patch: int = 1) -> "ScaleSchedule":
        """The published schedule of a template ratio and a pixel budget.

        Raises:
            FoveateError: Names the ratios or budgets that exist.
        """
        if height_over_width not in TEMPLATES:
            raise FoveateError(f"no aspect ratio h/w = {height_over_width}; there are {sorted(TEMPLATES)}")
        if budget not in BUDGETS:
            raise FoveateError(f"no pixel budget {budget!r}; there are {', '.join(BUDGETS)}")
        template = TEMPLATES[height_over_width]
        return cls(grids=template[: BUDGETS[budget]], finest=template[-1], patch=patch)


def parse_ratio(text: str) -> float:
    """Template key (height / width) of an aspect ratio written W:H.

    Raises:
        FoveateError: The ratio is not one of the 15; they are listed.
    """
    for key, name in _RATIO_NAMES.items():
        if text == name:
            return key
    possible = ", ".join(_RATIO_NAMES.values())
    try:
        wanted = Fraction(text.replace(":", "/"))
        match = {Fraction(name.replace(":", "/")): key for key, name in _RATIO_NAMES.items()}[wanted]
    except (ValueError, ZeroDivisionError, KeyError):
        raise FoveateError(f"aspect ratio must be one of {possible} (width:height), got {text!r}") from None
    return match


def sizes(stride: int, budgets: Sequence[str] = tuple(BUDGETS)) -> dict[tuple[int, int], tuple[float, str]]:
    """Every (width, height) in pixels that the templates give, with its ratio and budget.

    Args:
        stride: Pixels along a side of a token.
        budgets: The budgets to list.
    """
    found: dict[tuple[int, int], tuple[float, str]] = {}
    for ratio, grids in TEMPLATES.items():
        for budget in budgets:
            h, w = grids[BUDGETS[budget] - 1]
            found[(w * stride, h * stride)] = (ratio, budget)
    return found


def ratio_name(height_over_width: float) -> str:
    """The ratio as width:height."""
    return _RATIO_NAMES[height_over_width]
