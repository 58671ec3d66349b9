"""Budgets as settings: every dial, how near it comes on long schedules, what it says elsewhere, and compositions."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy, share_at, shares_at
from foveate.core.schedule import ScaleSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.policies.fit_budget import Dial, fit_below, fit_share
from foveate.policies.registry import REGISTRY, load_policy
from foveate.testing.toys import text_features

SHAPE = ModelShape(
    num_blocks=16, width=512, ff_width=2048, num_heads=8, head_width=64, head_outputs=64, input_channels=32,
    has_cross_attention=True, row_flops=10**6, text_token_flops=10**6, draws_bits=True,
)  # fmt: skip
IDS = replace(SHAPE, draws_bits=False)
LONG = ScaleSchedule.from_template(1.0, "0.25M")
"""2,521 tokens."""
WIDE = ScaleSchedule.from_template(0.4, "1M")

DIALS = [name for name, kind in REGISTRY.items() if kind.dial]


def request(schedule: ScaleSchedule) -> Request:
    count = len(schedule)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(3.0,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=(1,)),
        conditions=(text_features(1, 9),),
        num_images=1,
    )


def share_of(policy: Policy, schedule: ScaleSchedule = LONG) -> float:
    """FLOPs over those of the full run, before it runs."""
    asked = request(schedule)
    return forecast(policy.bind(schedule, SHAPE), asked, SHAPE).flops / full_cost(asked, SHAPE).flops


def fitted(spec: str, budget: float, schedule: ScaleSchedule = LONG) -> Policy:
    dial = Dial.of(load_policy(spec), schedule, SHAPE)
    return fit_share(dial, budget, lambda policy: share_of(policy, schedule))


def test_policies_with_counts_have_a_dial():
    assert set(DIALS) == {
        "skip-scales", "drop-branch", "random-tokens", "uniform-depth", "blocks-per-scale", "depthvar", "fastvar",
        "cached-guidance", "kv-eviction", "attention-entropy", "feature-magnitude", "token-variance", "fovea",
    }  # fmt: skip


@pytest.mark.parametrize("name", DIALS)
def test_a_dial_is_full_at_one_and_sinks_to_its_least(name: str):
    levels = [0.0, 0.1, 0.35, 0.5, 0.8, 1.0]
    found = [REGISTRY[name]().at_level(level, LONG, SHAPE) for level in levels]
    shares = [share_of(policy) for policy in found]
    # Reading attention's entropy costs up to a percent, and stops where everything is kept.
    assert all(later >= earlier - 0.01 for earlier, later in pairwise(shares))
    assert shares[0] < shares[-1]
    assert [type(policy) for policy in found] == [REGISTRY[name]] * len(found)
    if name != "fastvar":
        assert share_of(found[-1]) == 1
    rest = {field: value for field, value in REGISTRY[name]().settings().items() if field not in REGISTRY[name].dial}
    assert all(policy.settings() | rest == policy.settings() for policy in found)
    assert all(load_policy(policy.spec) == policy for policy in found)


@pytest.mark.parametrize("schedule", [LONG, WIDE], ids=["2521 tokens", "wide"])
@pytest.mark.parametrize("name", [name for name in DIALS if not REGISTRY[name].is_dial_coarse])
def test_rules_with_counts_come_within_two_percent_on_long_schedules(name: str, schedule: ScaleSchedule):
    dial = Dial.of(REGISTRY[name](), schedule, SHAPE)
    least, most = (share_of(dial.at(level), schedule) for level in (0.0, 1.0))
    budget = least + 0.4 * (most - least)
    assert share_of(fitted(name, budget, schedule), schedule) == pytest.approx(budget, rel=0.02)


@examples(max_examples=3)
@given(budget=st.floats(0.3, 1.0))
def test_any_share_in_reach_is_met(budget: float):
    assert share_of(fitted("random-tokens:num_scales=6", budget)) == pytest.approx(budget, rel=0.02)


def test_all_of_the_compute_changes_nothing():
    assert fitted("random-tokens", 1.0) == load_policy("random-tokens:keep_ratio=1.0")
    assert fitted("depthvar", 1.0).bind(LONG, SHAPE).directives == ()


def test_what_a_dial_does_not_reach_is_refused_with_its_range():
    least = 100 * share_of(load_policy("random-tokens:num_scales=1,keep_ratio=0.0001"))
    message = (
        f"^random-tokens:num_scales=1: keep_ratio reaches {least:.3g} % to 100 % of the FLOPs on this schedule, "
        "not 20 %; ask for a share in between, or take another policy$"
    )
    with pytest.raises(FoveateError, match=message):
        fitted("random-tokens:num_scales=1", 0.2)


def test_a_share_between_two_settings_names_both():
    shares = [100 * share_of(load_policy(f"skip-scales:count={count}")) for count in (2, 1)]
    middle = sum(shares) / 200
    message = (
        rf"of the FLOPs on this schedule in steps; nearest to {100 * middle:.3g} % are {shares[0]:.3g} % "
        rf"\(skip-scales:count=2\) and {shares[1]:.3g} % \(skip-scales\); ask for one of these shares$"
    )
    with pytest.raises(FoveateError, match=message):
        fitted("skip-scales", middle)
    assert fitted("skip-scales", shares[0] / 100) == load_policy("skip-scales:count=2")


@pytest.mark.parametrize("spec", ["ld-pruning", "late-bfloat16", "ld-pruning|late-bfloat16"])
def test_a_policy_without_a_dial_is_refused_with_those_that_have_one(spec: str):
    message = (
        f"^no budget can be set for {re.escape(spec)}: its compute is not known before the run, or it has no setting "
        "for it; take one of fovea, depthvar, fastvar, skip-scales, "
    )
    with pytest.raises(FoveateError, match=message):
        fitted(spec, 0.5)
    for part in load_policy(spec).parts_of():
        with pytest.raises(FoveateError, match=f"{part.name} has no setting whose compute is known before the run"):
            part.at_level(0.5, LONG, SHAPE)


def test_of_a_composition_the_first_fine_dial_is_turned_and_the_rest_stays():
    assert fitted("drop-branch:count=1|random-tokens", 0.5).parts_of()[0] == load_policy("drop-branch:count=1")
    first, second = fitted("random-tokens|cached-guidance:count=2", 0.5).parts_of()
    assert (second.spec, first.spec != "random-tokens") == ("cached-guidance:count=2", True)
    policy = fitted("late-bfloat16|random-tokens:num_scales=4|drop-branch:count=1", 0.5)
    assert share_of(policy) == pytest.approx(0.5, rel=0.02)
    first, second, third = policy.parts_of()
    assert (first.spec, third.spec) == ("late-bfloat16", "drop-branch:count=1")
    assert second == load_policy("random-tokens:num_scales=4").replace(keep_ratio=second.keep_ratio)
    assert 0.2 < second.keep_ratio < 0.8


def test_full_stands_for_fovea_where_tokens_hold_bits_and_for_depthvar_elsewhere():
    assert Dial.of(load_policy("full"), LONG, SHAPE).policy == load_policy("fovea")
    assert Dial.of(load_policy("full"), LONG, IDS).policy == load_policy("depthvar")


def test_a_dial_that_spreads_logits_is_refused_where_tokens_hold_ids():
    for spec in ("fovea", "fovea:shares=[],guided_shares=[]", "late-bfloat16|fovea"):
        with pytest.raises(FoveateError, match="^Fovea: logits are spread bit by bit, but a token of this model holds"):
            Dial.of(load_policy(spec), LONG, IDS)


def test_the_most_below_a_limit_and_the_least_where_nothing_is():
    dial = Dial.of(load_policy("random-tokens"), LONG, SHAPE)
    setting = fit_below(dial, 0.6, share_of)
    assert 0.6 * 0.995 <= share_of(setting.policy) <= 0.6
    assert setting.policy == dial.at(setting.level)
    assert fit_below(dial, 2.0, share_of).policy == load_policy("random-tokens:keep_ratio=1.0")
    assert fit_below(dial, 0.01, share_of).level == 0


def test_a_search_asks_for_few_costs():
    asked: list[Policy] = []

    def cost_of(policy: Policy) -> float:
        asked.append(policy)
        return share_of(policy)

    fit_share(Dial.of(load_policy("random-tokens"), LONG, SHAPE), 0.55, cost_of)
    assert len(asked) <= 8
    assert len(set(asked)) == len(asked)


def test_shares_at_a_level():
    assert [share_at(level) for level in (0.0, 0.25, 0.123456, 1.0)] == [1e-4, 0.25, 0.1235, 1.0]
    assert shares_at((0.6, 0.5), 0.5) == (0.6, 0.5)
    assert shares_at((0.6, 0.5), 0.75) == (0.8, 0.75)
    assert shares_at((0.6, 0.5), 0.25) == (0.3, 0.25)
    assert shares_at((0.6, 0.5), 1.0) == (1.0, 1.0)
    assert shares_at((0.6, 0.5), 0.0) == (1e-4, 1e-4)
