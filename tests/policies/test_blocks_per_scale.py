"""A share of the blocks per scale: which blocks run where, uniform-depth as its case, and the levels of its dial."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.core.schedule import ScaleSchedule
from foveate.policies.blocks_per_scale import BlocksPerScale, depth_of
from foveate.policies.registry import load_policy
from tests.policies.test_contract import SHAPE, plans_of
from tests.toys import cached_run, run, same_bits, toy

SCHEDULE = ScaleSchedule.from_template(1.0, "0.25M")


def depths(spec: str, schedule: ScaleSchedule = SCHEDULE) -> list[int]:
    """Blocks per scale; all tokens of a scale have the same."""
    found = []
    for plan in plans_of(load_policy(spec).bind(schedule, SHAPE), schedule):
        (depth_B,) = {int(depth) for part in plan.depths for depth in part.depth_Bl.flatten()} or {SHAPE.num_blocks}
        found.append(depth_B)
    return found


def test_every_scale_runs_its_own_share_in_bit_reversal_order():
    result = cached_run("blocks-per-scale:keep_ratios=[0.8,0.4,0.2]", "square")
    ran = {1: range(5), 2: (0, 4, 2, 1), 3: (0, 4), 4: (0,)}
    for scale, num_tokens in ((1, 4), (2, 16), (3, 36), (4, 64)):
        for row in result.trace.scales[scale].work.rows.values():
            assert row.block_tokens == tuple(num_tokens * (block in ran[scale]) for block in range(5))
            assert row.head_tokens == num_tokens


def test_entries_count_from_the_end_and_the_first_scale_runs_in_full():
    assert depths("blocks-per-scale:keep_ratios=[0.4,0.6]") == [5] * 8 + [2, 3]
    assert depths("blocks-per-scale:keep_ratios=[0.4,1.0,0.01]") == [5] * 7 + [2, 5, 1]
    short = ScaleSchedule.from_grids(((1, 1), (2, 2)))
    assert depths("blocks-per-scale:keep_ratios=[0.2,0.4,0.6]", short) == [5, 3]
    assert depths("blocks-per-scale:keep_ratios=[0.2]", ScaleSchedule.from_grids(((1, 1),))) == [5]


@pytest.mark.parametrize("name", ["square", "patches"])
def test_equal_shares_are_uniform_depth(name: str):
    for fill in ("cached", "identity"):
        shares = run(toy(name), load_policy(f"blocks-per-scale:keep_ratios=[0.4,0.4],fill={fill}"))
        uniform = run(toy(name), load_policy(f"uniform-depth:keep_ratio=0.4,num_scales=2,fill={fill}"))
        assert same_bits(shares, uniform)
    assert not torch.equal(shares.f_hat, cached_run("full", name).f_hat)


def test_a_full_scale_between_shallow_ones_is_kept_for_their_fills():
    bound = load_policy("blocks-per-scale:keep_ratios=[0.4,1.0,0.4]").bind(SCHEDULE, SHAPE)
    assert [bool(bound.keeps(scale)) for scale in range(10)] == [False] * 6 + [True] * 3 + [False]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("keep_ratios=[0.5,0]", r"keep_ratios must be shares in \(0, 1\], got \[0.5, 0.0\]"),
        ("keep_ratios=[1.5]", r"keep_ratios must be shares in \(0, 1\], got \[1.5\]"),
        ("keep_ratios=0.5", r"keep_ratios must be a list \[float, ...\]"),
        ("fill=zero", "fill must be cached"),
    ],
)
def test_wrong_settings_are_refused_by_name(spec: str, message: str):
    with pytest.raises(FoveateError, match=message):
        load_policy(f"blocks-per-scale:{spec}")


@settings(max_examples=40)
@given(st.lists(st.floats(0.01, 1.0), max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_more_level_never_runs_fewer_token_blocks(shares: list[float], a: float, b: float):
    """But for what rounding to whole blocks may take of the smallest scale."""
    policy, all_blocks = BlocksPerScale(keep_ratios=tuple(shares)), SHAPE.num_blocks
    tokens = [scale.num_tokens for scale in SCHEDULE.scales]

    def token_blocks(level: float) -> int:
        depths = policy.at_level(level, SCHEDULE, SHAPE).bind(SCHEDULE, SHAPE).depths
        return sum(n * depths.get(scale, all_blocks) for scale, n in enumerate(tokens))

    assert token_blocks(max(a, b)) >= token_blocks(min(a, b)) - tokens[1]
    assert token_blocks(1.0) == sum(tokens) * all_blocks
    assert token_blocks(0.0) == sum(tokens) * all_blocks - sum(tokens[10 - len(shares) :]) * (all_blocks - 1)


@pytest.mark.parametrize("level", [0.31, 0.37, 0.5, 0.63, 0.71, 0.94])
def test_whole_blocks_are_spread_over_scales_to_meet_a_level(level: float):
    """Of 400, 576 and 1,024 tokens the sums of some lie at most 400 apart; rounding each scale alone misses by more."""
    policy, tokens = BlocksPerScale(keep_ratios=(0.5, 0.5, 0.5)), (400, 576, 1024)
    found = policy.at_level(level, SCHEDULE, SHAPE)
    depths = [depth_of(ratio, SHAPE.num_blocks) for ratio in found.keep_ratios]
    spent = sum(n * depth for n, depth in zip(tokens, depths, strict=True))
    assert abs(spent - level * SHAPE.num_blocks * sum(tokens)) <= 200 + 1
