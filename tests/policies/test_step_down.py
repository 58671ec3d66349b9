"""Steps: which policy plans which scale, time that decides between them, and what a file keeps of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast
from foveate.policies.registry import from_stored, load_policy
from foveate.policies.step_down import StepDown, first_in_time
from foveate.testing import check_plans
from tests.policies.test_contract import SHAPE
from tests.toys import cached_run, make_request, run, same_bits, toy

STEPS = (load_policy("full"), load_policy("depthvar"), load_policy("random-tokens:keep_ratio=0.25|drop-branch"))
NEEDS = ((50.0, 40.0, 30.0, 20.0, 10.0), (30.0, 24.0, 18.0, 12.0, 6.0), (10.0, 8.0, 6.0, 4.0, 2.0))
LIVE = StepDown(steps=STEPS, needs_ms=NEEDS)


def timed(remaining_ms: dict[int, float]):
    """The run of the toy with so much time left before each scale."""
    request = replace(make_request(toy("square").schedule), remaining_ms=remaining_ms.__getitem__)
    return run(toy("square"), LIVE, request)


def test_plans_are_pure_below_their_ceiling_and_their_cost_is_known():
    policy = StepDown(steps=STEPS, taken=(0, 0, 1, 1, 2))
    check_plans(policy, toy("patches").schedule, SHAPE)
    result, request = run(toy("square"), policy), make_request(toy("square").schedule)
    assert result.trace.cost == forecast(policy.bind(request.schedule, SHAPE), request, SHAPE)


def test_one_step_is_that_policy():
    for index, step in enumerate(STEPS):
        alone, policy = run(toy("square"), step), StepDown(steps=(step,))
        assert same_bits(run(toy("square"), policy), alone)
        taken = StepDown(steps=STEPS, taken=(index,) * 5)
        found = run(toy("square"), taken)
        assert torch.equal(found.f_hat, alone.f_hat)
        assert found.trace.unfired == alone.trace.unfired


def test_scales_are_planned_by_the_step_that_is_taken():
    result = run(toy("square"), StepDown(steps=STEPS, taken=(0, 0, 0, 1, 2)))
    full, depthvar = cached_run("full", "square"), cached_run("depthvar", "square")
    assert torch.equal(result.f_hats[2], full.f_hats[2])
    assert result.trace.scales[3].work == depthvar.trace.scales[3].work
    rows = result.trace.scales[4].work.rows
    assert {(row.head_tokens, is_cond) for (_, is_cond), row in rows.items()} == {(16, True)}


def test_the_first_step_in_time_is_taken_and_never_a_higher_one():
    assert [first_in_time(NEEDS, 2, left, 0) for left in (99.0, 30.0, 29.9, 18.0, 6.0, 0.0)] == [0, 0, 1, 1, 2, 2]
    assert first_in_time(NEEDS, 2, 99.0, 1) == 1
    result = timed({1: 40.0, 2: 29.0, 3: 99.0, 4: 3.0})
    assert torch.equal(result.f_hat, run(toy("square"), StepDown(steps=STEPS, taken=(0, 0, 1, 1, 2))).f_hat)
    assert torch.equal(timed(dict.fromkeys(range(5), 99.0)).f_hat, cached_run("full", "square").f_hat)
    assert torch.equal(timed(dict.fromkeys(range(5), 0.0)).f_hats[0], cached_run("full", "square").f_hats[0])


def test_a_later_step_may_store_more_than_the_first_one():
    steps = [load_policy(f"blocks-per-scale:keep_ratios={ratios}") for ratios in ("[0.2,1,1]", "[1,0.6,0.2]")]
    live = StepDown(steps=tuple(steps), needs_ms=NEEDS[:2])
    request = replace(make_request(toy("square").schedule), remaining_ms={1: 99.0, 2: 0.0, 3: 0.0, 4: 0.0}.__getitem__)
    found = run(toy("square"), live, request)
    assert same_bits(found, run(toy("square"), StepDown(steps=live.steps, taken=(0, 0, 1, 1, 1))))
    beside = run(toy("square"), live | load_policy("full"), request)
    assert torch.equal(beside.f_hat, found.f_hat)


def test_a_step_without_times_needs_no_clock():
    """A deadline's own steps may hold a composition with a step-down in it."""
    inner = StepDown(steps=(load_policy("drop-branch"),))
    live = StepDown(steps=(load_policy("full"), inner | load_policy("random-tokens")), needs_ms=NEEDS[:2])
    request = replace(make_request(toy("square").schedule), remaining_ms=dict.fromkeys(range(5), 0.0).__getitem__)
    assert torch.equal(
        run(toy("square"), live, request).f_hat, run(toy("square"), live.replace(taken=(0, 1, 1, 1, 1))).f_hat
    )


def test_without_a_deadline_the_first_step_runs():
    assert torch.equal(run(toy("square"), LIVE).f_hat, cached_run("full", "square").f_hat)
    assert not LIVE.bind(toy("square").schedule, SHAPE).is_static
    assert StepDown(steps=STEPS, taken=(0,) * 5).bind(toy("square").schedule, SHAPE).is_static


def test_a_branch_that_one_step_drops_and_a_later_one_runs_is_refused_at_bind():
    steps = (load_policy("drop-branch:count=2"), load_policy("full"))
    for policy in (StepDown(steps=steps, taken=(0, 1)), StepDown(steps=steps, needs_ms=NEEDS[:2])):
        message = "step-down: full runs both branches at scale 4, but drop-branch drops one at scale 3"
        with pytest.raises(PlanConflictError, match=message):
            policy.bind(toy("square").schedule, SHAPE)
    assert StepDown(steps=steps, taken=(0, 0)).bind(toy("square").schedule, SHAPE).is_static
    assert StepDown(steps=steps[::-1], needs_ms=NEEDS[:2]).bind(toy("square").schedule, SHAPE).directives == ()


def test_steps_keep_nothing_over_what_another_one_fills_from():
    from_scale_2 = load_policy("fastvar:skip_last=0,reference_scale=-3,first_block=1")
    steps = (load_policy("full"), from_scale_2, load_policy("blocks-per-scale:keep_ratios=[0.5]"))
    message = "step-down: fastvar:.* fills scale 4 with what it kept up to scale 2, but another step keeps scale 3 in"
    with pytest.raises(PlanConflictError, match=message):
        StepDown(steps=steps, needs_ms=NEEDS).bind(toy("square").schedule, SHAPE)
    unused = run(toy("square"), StepDown(steps=steps, taken=(1,) * 5))
    assert same_bits(unused, run(toy("square"), from_scale_2))
    live = StepDown(steps=steps[:2], needs_ms=NEEDS[:2])
    with pytest.raises(PlanConflictError, match=r"step-down \| blocks-per-scale: two fills"):
        (live | steps[2]).bind(toy("square").schedule, SHAPE)


def test_files_and_specs_keep_every_field_of_the_steps(tmp_path: Path):
    policy = StepDown(steps=STEPS, taken=(0, 1, 2), needs_ms=((1.5, 2.0, 3.0),) * 3)
    stored = json.loads(json.dumps(policy.stored()))
    assert stored["steps"][1][0]["reference_scale"] == -4
    assert from_stored([stored]) == policy
    assert load_policy(policy.spec) == policy
    assert policy.spec.startswith(
        'step-down:steps=["full","depthvar","random-tokens:keep_ratio=0.25|drop-branch"],taken='
    )
    policy.to_yaml(tmp_path / "p.yaml")
    assert load_policy(tmp_path / "p.yaml") == policy
    assert policy.fingerprint != policy.replace(taken=(0, 0, 2)).fingerprint
    assert load_policy('step-down:steps=["skip-scales:count=2"]') == StepDown(
        steps=(load_policy("skip-scales:count=2"),)
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ('steps=["full","full"],taken=[0,2]', r"taken must be steps from 0 to 1 that never fall, got \[0, 2\]"),
        ('steps=["full","full"],taken=[1,0]', r"taken must be steps from 0 to 1 that never fall, got \[1, 0\]"),
        ('steps=["full","full"]', "taken must be one step per scale where there are several, got none"),
        ('steps=["full"],needs_ms=[[1],[2]]', "needs_ms must be one list for each of 1 steps, got 2 lists"),
        ("steps=full", "steps must be a list of specs"),
        ('steps=["fulll"]', "did you mean full"),
    ],
)
def test_wrong_settings_are_refused_by_name(spec: str, message: str):
    with pytest.raises(FoveateError, match=message):
        load_policy(f"step-down:{spec}")


def test_a_list_that_does_not_fit_the_schedule_is_refused():
    with pytest.raises(FoveateError, match="needs_ms needs an entry for each of the 7 scales of this schedule"):
        LIVE.bind(ScaleSchedule.from_template(1.0, "0.06M"), SHAPE)


def test_steps_that_were_taken_count_from_the_end():
    policy = StepDown(steps=(STEPS[0], STEPS[0], load_policy("drop-branch")), taken=(1, 2))
    assert policy.bind(toy("square").schedule, SHAPE).highest == (0, 0, 0, 1, 2)
    assert policy.bind(ScaleSchedule.from_grids(((1, 1),)), SHAPE).highest == (2,)
