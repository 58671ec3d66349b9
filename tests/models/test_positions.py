"""Rotary grid positions follow the published arithmetic: scaled in float32, rounded half to even."""

import math

import pytest
import torch

from foveate.core.schedule import BUDGETS, TEMPLATES, ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig

CONFIG = InfinityConfig(depth=1, width=32, heads=2, bits=4, text_width=8, pool_heads=2, text_tokens=4, ff_width=32)


def test_ties_of_all_templates() -> None:
    """The published schedules have 8,938 coordinates, of which 516 sit exactly between two cells."""
    coordinates = ties = 0
    for grids in TEMPLATES.values():
        for grid in grids:
            for size, finest in zip(grid, grids[-1], strict=True):
                place = torch.arange(size) * (finest / size)
                assert place.dtype == torch.float32
                coordinates += size
                ties += int((place % 1 == 0.5).sum())
    assert (coordinates, ties) == (8938, 516)


@pytest.mark.parametrize("ratio", list(TEMPLATES))
@pytest.mark.parametrize("budget", list(BUDGETS))
def test_angles_against_a_loop(ratio: float, budget: str) -> None:
    """First half of the angles by row, second half by column; positions of the largest grid whatever the budget."""
    schedule = ScaleSchedule.from_template(ratio, budget)
    scale = len(schedule) - 1
    (h, w), (tall, wide) = schedule.grids[scale], TEMPLATES[ratio][-1]
    table = Infinity(CONFIG).positions(schedule, scale)
    assert table.shape == (h * w, 16)
    row_place = (torch.arange(h) * (tall / h)).tolist()
    column_place = (torch.arange(w) * (wide / w)).tolist()
    for r, c in {(0, 0), (h // 2, w // 3), (h - 1, w - 1), (1 % h, w // 2)}:
        y, x = round(row_place[r]), round(column_place[c])
        angles = [y * 10000 ** (-2 * i / 8) for i in range(4)] + [x * 10000 ** (-2 * i / 8) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert table[r * w + c].tolist() == pytest.approx(expected, abs=2e-5)
