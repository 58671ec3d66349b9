"""What every registered policy owes: a frozen record, a docstring, a neutral setting, pure plans below its ceiling."""

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.plan import Directive, ScalePlan
from foveate.core.schedule import TEMPLATES, ScaleSchedule
from foveate.core.signals import BranchLogits, Signal, Signals
from foveate.engine.state import ceiling_tokens
from foveate.policies.registry import REGISTRY, load_policy
from tests.toys import cached_run, run, toy

SCHEDULES = [
    ScaleSchedule.from_template(1.0, "0.06M"),
    ScaleSchedule.from_template(0.333, "0.25M"),
    ScaleSchedule.from_grids(TEMPLATES[1.75][:5], patch=2),
    ScaleSchedule.from_grids(((2, 3),)),
]
SHAPE = toy("square").model.shape


def some_signals(schedule: ScaleSchedule, scale: int, wanted: frozenset[Signal], num_images: int = 2) -> Signals:
    """Random answers to what was asked for, and nothing else."""
    generator = torch.Generator().manual_seed(scale)
    grid = schedule.grids[scale]
    logits = [torch.randn(5, 6, generator=generator) for _ in range(2 * num_images)]
    return Signals(
        scale=scale,
        grid=grid,
        residual_BZhw=torch.randn(num_images, 4, *schedule.latent_grid(scale), generator=generator)
        if Signal.RESIDUAL in wanted
        else None,
        logits=tuple(BranchLogits(cond_kV=a, uncond_kV=b) for a, b in zip(logits[::2], logits[1::2], strict=True))
        if Signal.LOGITS in wanted
        else None,
        block_change_Bl=torch.rand(num_images, grid[0] * grid[1], generator=generator)
        if Signal.BLOCK_CHANGE in wanted
        else None,
    )


def plans_of(bound: Any, schedule: ScaleSchedule, num_images: int = 2) -> list[ScalePlan]:
    plans, state, signals = [], bound.start(), None
    for scale in range(len(schedule)):
        plan, state = bound.plan(scale, signals, state)
        plans.append(plan)
        if plan.runs:
            signals = some_signals(schedule, scale, bound.record(scale), num_images)
    return plans


def as_data(plan: ScalePlan, schedule: ScaleSchedule, scale: int) -> list[object]:
    keep_Bl = plan.keep(2, schedule.scales[scale].num_tokens)
    active = [plan.active(block) for block in range(SHAPE.num_blocks)]
    weight = plan.weight_Bl
    tensors = [keep_Bl, *active, weight]
    return [plan.runs, plan.unconditional, plan.fill, plan.base, *(t if t is None else t.tolist() for t in tensors)]


@pytest.mark.parametrize("kind", REGISTRY.values(), ids=list(REGISTRY))
def test_policy_is_a_frozen_record_with_defaults_and_a_docstring(kind):
    policy = kind()
    assert policy == kind(**policy.settings())
    assert inspect.getdoc(kind)
    assert inspect.getdoc(inspect.getmodule(kind))
    for field in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, field.name, field.default)
    with pytest.raises((TypeError, AttributeError)):
        policy.other = 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{len(s)} scales")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_neutral_plans_everything_on_every_schedule(name: str, schedule: ScaleSchedule):
    bound = REGISTRY[name].neutral().bind(schedule, SHAPE)
    full = as_data(ScalePlan(), schedule, 0)
    for scale, plan in enumerate(plans_of(bound, schedule)):
        assert as_data(plan, schedule, scale) == full
        assert not bound.record(scale)
    assert bound.directives == ()
    assert bound.is_static


@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: f"{len(s)} scales")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_plans_are_pure_and_nest_in_the_ceiling(name: str, schedule: ScaleSchedule):
    """Two walks over one bound policy agree; no plan runs more than its ceiling; a static one runs exactly that."""
    bound = REGISTRY[name]().bind(schedule, SHAPE)
    first, second = plans_of(bound, schedule), plans_of(bound, schedule)
    for scale, (plan, again) in enumerate(zip(first, second, strict=True)):
        assert as_data(plan, schedule, scale) == as_data(again, schedule, scale)
        num_tokens = schedule.scales[scale].num_tokens
        limits = ceiling_tokens(bound.ceiling(scale), num_tokens, SHAPE.num_blocks)
        for counts in counts_of(plan, num_tokens):
            if bound.is_static:
                assert counts == limits
            assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
        for depth in plan.depths:
            # The engine cuts its lists at these numbers, and the trace reports them.
            for place, count in enumerate(depth.counts or ()):
                assert ((depth.depth_Bl > place).sum(-1) == count).all()


def counts_of(plan: ScalePlan, num_tokens: int) -> list[list[int]]:
    """Tokens per block of each of two images."""
    keep_Bl = plan.keep(2, num_tokens)
    keep_Bl = torch.ones(2, num_tokens, dtype=torch.bool) if keep_Bl is None else keep_Bl
    active = [plan.active(block) for block in range(SHAPE.num_blocks)]
    masks = [keep_Bl if a is None else keep_Bl & a for a in active]
    return [[int(mask[image].sum()) * plan.runs for mask in masks] for image in range(2)]


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
        "skip scales", "stop the unconditional branch", "drop tokens", "skip blocks"
    }  # fmt: skip
