"""Schedules: the published grids, token counts, sizes and names of ratios."""

from itertools import pairwise

import pytest

from foveate.core.errors import FoveateError
from foveate.core.schedule import (
    BUDGETS,
    TEMPLATES,
    ScaleSchedule,
    parse_ratio,
    ratio_name,
    sizes,
)


def test_published_token_counts():
    counts = {budget: ScaleSchedule.from_template(1.0, budget).num_tokens for budget in BUDGETS}
    assert counts["1M"] == 10521
    assert counts["0.06M"] == 521
    assert len(ScaleSchedule.from_template(1.0, "1M")) == 13
    assert ScaleSchedule.from_template(1.0, "0.06M").grids[-1] == (16, 16)


@pytest.mark.parametrize("ratio", list(TEMPLATES))
def test_every_template_grows_and_is_near_its_ratio(ratio: float):
    grids = TEMPLATES[ratio]
    assert len(grids) == 13
    assert grids[0] == (1, 1)
    assert all(b[0] >= a[0] and b[1] >= a[1] for a, b in pairwise(grids))
    h, w = grids[-1]
    assert h / w == pytest.approx(ratio, rel=0.02)
    assert 0.9 < h * w / 4096 < 1.1


def test_fifteen_ratios_in_pairs():
    assert len(TEMPLATES) == 15
    for ratio, grids in TEMPLATES.items():
        mirrored = tuple((w, h) for h, w in grids)
        assert mirrored in TEMPLATES.values()
        assert parse_ratio(ratio_name(ratio)) == ratio


@pytest.mark.parametrize(
    ("text", "ratio"), [("1:1", 1.0), ("16:12", 0.75), ("2:3", 1.5), ("3:2", 0.666), ("1/2", 2.0), ("6:2", 0.333)]
)
def test_ratio_is_width_by_height(text: str, ratio: float):
    assert parse_ratio(text) == ratio
    h, w = TEMPLATES[ratio][-1]
    assert (h > w) == (ratio > 1)


@pytest.mark.parametrize("text", ["", "7:11", "1:0", "square", "1:2:3"])
def test_unknown_ratio_lists_the_known_ones(text: str):
    with pytest.raises(FoveateError, match="aspect ratio must be one of 1:1, 4:5"):
        parse_ratio(text)


def test_unknown_template_or_budget_lists_the_known_ones():
    with pytest.raises(FoveateError, match="no pixel budget '2M'; there are 0.06M"):
        ScaleSchedule.from_template(1.0, "2M")
    with pytest.raises(FoveateError, match="no aspect ratio"):
        ScaleSchedule.from_template(1.1, "1M")


def test_schedules_must_not_shrink_or_be_empty():
    with pytest.raises(FoveateError, match="must not shrink"):
        ScaleSchedule.from_grids(((1, 1), (4, 4), (6, 3)))
    with pytest.raises(FoveateError, match="at least one grid"):
        ScaleSchedule.from_grids(())
    assert len(ScaleSchedule.from_grids(((2, 2), (2, 2)))) == 2


def test_finest_is_the_last_grid_of_the_template_or_of_the_schedule():
    assert ScaleSchedule.from_grids(TEMPLATES[1.5][:7]).finest == (78, 52)
    assert ScaleSchedule.from_grids(((1, 1), (3, 5))).finest == (3, 5)
    assert ScaleSchedule.from_grids(((1, 1), (3, 5)), finest=(9, 15)).finest == (9, 15)
    assert ScaleSchedule.from_template(0.75, "0.06M").finest == TEMPLATES[0.75][-1]


def test_latent_grid_counts_patches():
    schedule = ScaleSchedule.from_grids(((1, 1), (2, 3)), patch=2)
    assert schedule.latent_grid(1) == (4, 6)
    assert schedule.num_tokens == 7
    assert [(s.index, s.num_tokens) for s in schedule.scales] == [(0, 1), (1, 6)]


def test_sizes_are_width_by_height_in_pixels():
    known = sizes(16)
    assert known[(1024, 1024)] == (1.0, "1M")
    assert known[(256, 256)] == (1.0, "0.06M")
    assert known[(52 * 16, 78 * 16)] == (1.5, "1M")
    assert set(sizes(8, ["0.06M"]).values()) == {(ratio, "0.06M") for ratio in TEMPLATES}
