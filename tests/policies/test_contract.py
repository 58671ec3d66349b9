"""What every registered policy owes: a frozen record, a docstring, a neutral setting, pure plans below its ceiling."""

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.plan import ScalePlan
from foveate.core.policy import Directive
from foveate.core.schedule import TEMPLATES, ScaleSchedule
from foveate.policies.registry import REGISTRY, load_policy
from foveate.testing import check_plans, check_record, plans_of
from foveate.testing.contract import as_data
from tests.toys import cached_run, run, toy

SCHEDULES = [
    ScaleSchedule.from_template(1.0, "0.06M"),
    ScaleSchedule.from_template(0.333, "0.25M"),
    ScaleSchedule.from_grids(TEMPLATES[1.75][:5], patch=2),
    ScaleSchedule.from_grids(((2, 3),)),
]
SHAPE = toy("square").model.shape


@pytest.mark.parametrize("kind", REGISTRY.values(), ids=list(REGISTRY))
def test_policy_is_a_frozen_record_with_defaults_and_a_docstring(kind):
    check_record(kind)
    with pytest.raises((TypeError, AttributeError)):
        kind().other = 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{len(s)} scales")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_neutral_plans_everything_on_every_schedule(name: str, schedule: ScaleSchedule):
    bound = REGISTRY[name].neutral().bind(schedule, SHAPE)
    for scale, plan in enumerate(plans_of(bound, schedule)):
        num_tokens = schedule.scales[scale].num_tokens
        assert as_data(plan, num_tokens, SHAPE.num_blocks) == as_data(ScalePlan(), num_tokens, SHAPE.num_blocks)
        assert not bound.record(scale)
        assert not bound.keeps(scale)
    assert bound.directives == ()
    assert bound.is_static


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: f"{len(s)} scales")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_plans_are_pure_and_nest_in_the_ceiling(name: str, schedule: ScaleSchedule):
    check_plans(REGISTRY[name](), schedule, SHAPE)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_promises_are_kept_or_reported(name: str):
    result = cached_run(name, "square")
    promised = {directive.value for directive in result.bound.directives}
    fired = {directive.value for directive in result.trace.fired()}
    assert promised == (promised & fired) | set(result.trace.unfired)
    assert fired <= promised


@pytest.mark.parametrize("name", list(REGISTRY))
def test_first_scale_always_runs(name: str):
    bound = REGISTRY[name]().bind(SCHEDULES[0], SHAPE)
    plan = plans_of(bound, SCHEDULES[0])[0]
    assert plan.runs
    assert plan.keep(2, 1) is None


# The trivial controls


def test_skip_scales_leaves_the_last_ones_out():
    plans = plans_of(load_policy("skip-scales:count=2").bind(SCHEDULES[0], SHAPE), SCHEDULES[0])
    assert [plan.runs for plan in plans] == [True] * 5 + [False] * 2
    result = cached_run("skip-scales:count=2", "square")
    full = cached_run("full", "square")
    assert torch.equal(result.f_hat, full.f_hats[2])
    assert [scale.ran for scale in result.trace.scales] == [True, True, True, False, False]


def test_drop_branch_runs_the_prompt_alone_at_the_end():
    result = cached_run("drop-branch:count=2", "square")
    full = cached_run("full", "square")
    assert [len(scale.work.rows) for scale in result.trace.scales] == [6, 6, 6, 3, 3]
    assert torch.equal(result.f_hats[2], full.f_hats[2])
    assert not torch.equal(result.f_hats[3], full.f_hats[3])
    everywhere = cached_run("drop-branch:count=99", "square")
    assert [len(scale.work.rows) for scale in everywhere.trace.scales] == [3] * 5


def test_random_tokens_are_the_same_for_every_image_and_run_but_not_for_every_key():
    first, again, other = (
        run(toy("square"), load_policy(f"random-tokens:key={key},keep_ratio=0.25")) for key in (0, 0, 1)
    )
    kept = [result.choices[4].kept for result in (first, again, other)]
    assert all(torch.equal(kept[0][0], part) for part in (*kept[0], *kept[1]))
    assert not torch.equal(kept[0][0], kept[2][0])
    assert [len(first.choices[scale].symbols[0]) for scale in range(5)] == [1, 4, 4, 9, 16]


def test_uniform_depth_runs_the_same_blocks_for_all():
    result = cached_run("uniform-depth:keep_ratio=0.4,num_scales=2", "square")
    for scale, num_tokens in ((2, 16), (3, 36), (4, 64)):
        for row in result.trace.scales[scale].work.rows.values():
            ran = (0, 1, 2, 3, 4) if scale == 2 else (0, 4)
            assert row.block_tokens == tuple(num_tokens * (block in ran) for block in range(5))
            assert row.head_tokens == num_tokens


@pytest.mark.parametrize(
    "spec",
    [
        "skip-scales:count=-1", "drop-branch:count=-1", "random-tokens:keep_ratio=0", "random-tokens:num_scales=-1",
        "random-tokens:key=-1", "random-tokens:key=18446744073709551616",
        "uniform-depth:keep_ratio=1.01", "uniform-depth:num_scales=-1",
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(spec: str):
    field = spec.partition(":")[2].partition("=")[0]
    with pytest.raises(FoveateError, match=f"{field} must be"):
        load_policy(spec)


def test_skipping_every_scale_is_refused():
    with pytest.raises(FoveateError, match="count must be less than the 5 scales, got 5"):
        load_policy("skip-scales:count=5").bind(toy("square").schedule, SHAPE)


def test_directives_are_named_for_people():
    assert {directive.value for directive in Directive} == {
        "skip scales", "stop the unconditional branch", "run the unconditional branch on fewer tokens", "drop tokens",
        "skip blocks", "skip sublayers", "evict keys", "run blocks in a narrower dtype",
    }  # fmt: skip
