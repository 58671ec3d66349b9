"""SparseVAR against plain loops: how many tokens run and which, whose code a dropped token copies, the cost."""

import math

import pytest
import torch

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import Base
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import BlockChange, BranchLogits, Signal
from foveate.policies.registry import load_policy
from foveate.policies.sparsevar import SparseVAR, anchor_corners, most_similar, places_in
from tests.policies.following import (
    Seen,
    assert_forecast_holds,
    assert_highest,
    enlarged,
    follow,
    kept_of,
)
from tests.toys import SEEDS, cached_run, checked, label_request, make_request, run, same_bits, toy, toy_var

NAMES = ("square", "wide", "odd", "patches")
POLICIES = (
    SparseVAR(threshold=0.995, stride=3, similarity=0.999),
    SparseVAR(threshold=0.97, similarity=-1.0, num_scales=2, first_block=-3, end_block=-1),
)
"""Toys change all tokens nearly alike and expect nearly the same of all, so only high thresholds split them."""


# Slow twins


def changes(seen: Seen, first: int, end: int) -> list[float]:
    """Mean over channels of the squared change across a range of blocks, averaged over the branches."""
    totals = []
    for deltas in seen.deltas:
        change_lC = sum(deltas[block].double() for block in range(first, end))
        totals.append([sum(x * x for x in row) / len(row) for row in change_lC.tolist()])
    return [(a + b) / 2 for a, b in zip(*totals, strict=True)]


def anchors_of(grid: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    return [(y, x) for y in range(0, grid[0], stride) for x in range(0, grid[1], stride)]


def likeness(seen: Seen, grid: tuple[int, int], a: tuple[int, int], b: tuple[int, int]) -> float:
    """Cosine of the logits at two places of the previous grid; none where a place did not run."""
    rows = []
    for y, x in (a, b):
        place = (y * seen.grid[0] // grid[0]) * seen.grid[1] + x * seen.grid[1] // grid[1]
        if place not in seen.kept:
            return -math.inf
        rows.append(seen.logits_kV[seen.kept.index(place)].double().tolist())
    dot = sum(p * q for p, q in zip(*rows, strict=True))
    return dot / math.sqrt(sum(p * p for p in rows[0]) * sum(q * q for q in rows[1]))


def candidates(seen: Seen, grid: tuple[int, int], stride: int, token: int) -> dict[int, float]:
    """The anchors of a token's lattice cell, each with its likeness."""
    y, x = divmod(token, grid[1])
    return {
        ay * grid[1] + ax: likeness(seen, grid, (y, x), (ay, ax))
        for ay, ax in anchors_of(grid, stride)
        if -stride < ay - y <= stride and -stride < ax - x <= stride
    }


# In the engine


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", POLICIES, ids=["strict", "always alike"])
def test_choices_copies_and_commits_replay(policy: SparseVAR, name: str):
    """Everything that a run decided, image by image, from notes that the engine had no part in."""
    subject, result = toy(name), cached_run(policy.spec, name)
    first, num_dropped = 5 - policy.num_scales, 0
    blocks = (2, 4) if policy.first_block else (0, 5)
    lost = [0] * 5
    for image in range(len(SEEDS)):
        kept = kept_of(result, name, image)
        sources = [None if plan.source_Bl is None else plan.source_Bl[image].tolist() for plan in result.bound.plans]
        seen = follow(subject, make_request(subject.schedule), image, kept, Base.COPY, sources)
        change = changes(seen[first - 1], *blocks)
        share = sum(d > policy.threshold * max(change) for d in change) / len(change)
        for scale, grid in enumerate(subject.schedule.grids):
            assert torch.allclose(result.f_hats[scale][image], seen[scale].f_hat, atol=1e-4)
            lost[scale] += seen[scale].num_lost
            if scale < first:
                assert kept[scale] == list(range(grid[0] * grid[1]))
                continue
            anchors = [y * grid[1] + x for y, x in anchors_of(grid, policy.stride)]
            count = math.ceil(share * grid[0] * grid[1] - 1e-9)
            assert_highest(kept[scale], enlarged(change, seen[first - 1].grid, grid), count, anchors)
            for token in set(range(grid[0] * grid[1])) - set(kept[scale]):
                alike = candidates(seen[scale - 1], grid, policy.stride, token)
                best, source = max(alike.values()), sources[scale][token]
                num_dropped += 1
                if abs(best - policy.similarity) > 1e-5:
                    assert (source == token) == (best < policy.similarity)
                assert source == token or alike[source] > best - 1e-5
    assert [scale.lost_copies for scale in result.trace.scales] == lost
    assert num_dropped > 40
    if policy.similarity > 0:
        assert 0.05 * num_dropped < sum(lost) < 0.95 * num_dropped


@pytest.mark.parametrize("name", NAMES)
def test_anchors_are_computed_and_only_they_are_copied(name: str):
    result = cached_run(POLICIES[0].spec, name)
    for scale in (2, 3, 4):
        grid = toy(name).schedule.grids[scale]
        anchors = {y * grid[1] + x for y, x in anchors_of(grid, 3)}
        for image, source_l in enumerate(result.bound.plans[scale].source_Bl.tolist()):
            kept = set(result.choices[scale].positions(image, grid[0] * grid[1]))
            assert anchors <= kept
            assert all(source in anchors for token, source in enumerate(source_l) if source != token)


def test_every_image_runs_its_own_number_of_tokens():
    counts = [len(bits) for bits in cached_run(POLICIES[0].spec, "square").choices[4].symbols]
    assert len(set(counts)) > 1
    assert all(9 <= count < 64 for count in counts)


@pytest.mark.parametrize("name", ["square", "patches"])
@pytest.mark.parametrize("policy", POLICIES, ids=["strict", "always alike"])
def test_cost_stays_below_what_was_said_before(policy: SparseVAR, name: str):
    assert_forecast_holds(cached_run(policy.spec, name), name, is_static=False)


def test_codebooks_copy_whole_ids():
    """On the VAR family, one id per token; a token whose anchor is alike commits the anchor's code."""
    subject = toy_var()
    result = run(subject, POLICIES[0].replace(similarity=-1.0), label_request(subject.schedule))
    step = result.bound.plans[4]
    assert torch.isfinite(result.f_hat).all()
    dropped = [set(range(36)) - set(result.choices[4].positions(image, 36)) for image in range(3)]
    assert sum(map(len, dropped)) > 30
    residual_BZl = (result.f_hats[4] - result.f_hats[3]).flatten(2)
    for image, tokens in enumerate(dropped):
        for token in tokens:
            # The last grid is not resized, so equal codes add equal latents, up to the smoothing of that tokenizer.
            source = int(step.source_Bl[image, token])
            assert source in result.choices[4].positions(image, 36) or source == token
    assert residual_BZl.abs().sum() > 0


# Places and likeness


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (5, 9), (8, 8), (9, 7)])
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_corners_are_the_anchors_of_the_cell(grid: tuple[int, int], stride: int):
    corner_cl = anchor_corners(grid, stride)
    anchors = anchors_of(grid, stride)
    for token in range(grid[0] * grid[1]):
        y, x = divmod(token, grid[1])
        near = {ay * grid[1] + ax for ay, ax in anchors if -stride < ay - y <= stride and -stride < ax - x <= stride}
        assert set(corner_cl[:, token].tolist()) == near
        assert (int(corner_cl[0, token]) == token) == ((y, x) in anchors)


@pytest.mark.parametrize(
    ("previous", "grid"), [((4, 4), (6, 6)), ((3, 6), (5, 10)), ((1, 1), (3, 2)), ((5, 5), (5, 5))]
)
def test_places_are_those_of_nearest_enlargement(previous: tuple[int, int], grid: tuple[int, int]):
    numbers = torch.arange(previous[0] * previous[1]).view(1, 1, *previous).float()
    expected = torch.nn.functional.interpolate(numbers, size=grid, mode="nearest").flatten().long()
    assert torch.equal(places_in(previous, grid), expected)


def test_likeness_goes_by_place_and_not_by_row():
    """The tokens that ran stand in another order than their places; the one in between did not run."""
    logits = BranchLogits(cond_kV=torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]), index_k=torch.tensor([0, 2, 3]))
    places, corners = torch.arange(4), torch.tensor([[0, 0, 0, 0], [2, 2, 2, 2]])
    assert most_similar(logits, places, corners, 4, 0.8).tolist() == [0, 1, 2, 0]
    assert most_similar(logits, places, corners, 4, -1.0).tolist() == [0, 1, 2, 0]
    assert most_similar(logits, places, corners, 4, 1.0).tolist() == [0, 1, 2, 3]


def test_composition_may_drop_anchors_and_refuses_a_second_base():
    result = cached_run("sparsevar:threshold=0.995,stride=3,similarity=-1|random-tokens:fill=zero", "square")
    assert sum(scale.lost_copies for scale in result.trace.scales) > 10
    shape, schedule = toy("square").model.shape, toy("square").schedule
    with pytest.raises(PlanConflictError, match=r"sparsevar \| random-tokens: two base maps"):
        load_policy("sparsevar|random-tokens").bind(schedule, shape)


# Settings


def test_signals_are_recorded_only_where_a_later_scale_reads_them():
    schedule, shape = ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape
    bound = load_policy("sparsevar:num_scales=2,first_block=1,end_block=-1").bind(schedule, shape)
    change = BlockChange(first=1, end=4, power=2, branches="mean")
    assert [bound.record(s) for s in (9, 10, 11, 12)] == [set(), {Signal.LOGITS, change}, {Signal.LOGITS}, set()]
    assert not bound.is_static


@pytest.mark.parametrize("count", [2, 4])
def test_another_part_may_leave_out_the_scales_that_are_read(count: int):
    """They are the last ones, so nothing is left to decide."""
    result = cached_run(f"sparsevar:num_scales=1,threshold=0.97,stride=3|skip-scales:count={count}", "square")
    assert same_bits(result, cached_run(f"skip-scales:count={count}", "square"))


@pytest.mark.parametrize("policy", [SparseVAR.neutral(), SparseVAR(stride=1)])
def test_switched_off_is_full(policy: SparseVAR):
    result = run(toy("odd"), policy)
    assert same_bits(result, cached_run("full", "odd"))
    assert result.bound.directives == ()
    assert result.bound.is_static
    assert not any(result.bound.record(scale) for scale in range(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_scales", -1), ("threshold", 1.0), ("threshold", math.nan), ("similarity", 1.5), ("stride", 0)],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be .* got {value}"):
        checked(SparseVAR(), field, value)


@pytest.mark.parametrize(("first", "end"), [(3, 3), (-6, 0), (0, 6), (5, 0)])
def test_blocks_must_be_a_range_of_the_model(first: int, end: int):
    with pytest.raises(FoveateError, match="first_block to end_block must be a range within the 5 blocks, got"):
        SparseVAR(first_block=first, end_block=end).bind(toy("square").schedule, toy("square").model.shape)
