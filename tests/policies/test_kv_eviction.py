"""KVEviction against a slow twin whose attention reads listed scales; what is held, allocated, forecast and counted."""

import copy
from dataclasses import replace

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast
from foveate.engine.state import bounds_of
from foveate.policies.kv_eviction import KVEviction
from foveate.policies.registry import load_policy
from tests.policies.test_cached_guidance import lowest
from tests.policies.twins import assert_same, full_steps, generate_image
from tests.toys import SpyBound, cached_run, checked, label_request, make_request, run, same_bits, toy, toy_var

SETTINGS = [
    KVEviction(keep_first=1, window=1),
    KVEviction(keep_first=2, window=1),
    KVEviction(keep_first=0, window=2),
    KVEviction(keep_first=1, window=0),
    KVEviction(keep_first=0, window=0),
]
spec = pytest.mark.parametrize("policy", SETTINGS, ids=lambda policy: policy.spec)


def seen_by(policy: KVEviction, scale: int) -> tuple[int, ...]:
    """The earlier scales that a scale reads: the first ones and the latest ones."""
    return tuple(s for s in range(scale) if s < policy.keep_first or s >= scale - policy.window)


def steps_of(subject, policy: KVEviction):
    return [replace(step, seen=seen_by(policy, scale)) for scale, step in enumerate(full_steps(subject))]


# Which keys


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["odd", "patches"])
@spec
def test_run_equals_attention_over_listed_scales(policy: KVEviction, name: str):
    subject, request = toy(name), make_request(toy(name).schedule)
    result = run(subject, policy, request)
    assert_same(result, generate_image(subject, request, 1, steps_of(subject, policy)), 1)
    assert not torch.equal(result.f_hat, cached_run("full", name).f_hat)
    assert result.trace.unfired == ()


def test_run_equals_the_twin_on_ids():
    subject, policy = toy_var(), KVEviction(keep_first=1, window=1)
    request = label_request(subject.schedule)
    result = run(subject, policy, request)
    assert_same(result, generate_image(subject, request, 2, steps_of(subject, policy)), 2)


def test_rows_with_different_counts_lose_their_own_keys():
    """The unconditional branch holds fewer tokens of scale 3, and tokens of it were dropped in both."""
    subject, policy = toy("odd"), KVEviction(keep_first=1, window=1)
    request = make_request(subject.schedule)
    whole = load_policy("random-tokens:fill=zero,num_scales=3,keep_ratio=0.6|cached-guidance:count=3,keep_ratio=0.4")
    result, free = run(subject, whole | policy, request), run(subject, whole, request)
    steps = steps_of(subject, policy)
    for scale in (2, 3, 4):
        kept = tuple(result.choices[scale].kept[1].tolist())
        guided = lowest(subject.schedule.grids[scale], 0.4, kept)
        steps[scale] = replace(steps[scale], kept=kept, guided=guided, source=1, weight=0.5)
    assert_same(result, generate_image(subject, request, 1, steps), 1)
    assert not torch.equal(result.choices[4].logits[1], free.choices[4].logits[1])


def test_one_scale_goes_as_the_window_moves_and_none_after_the_last():
    schedule = ScaleSchedule.from_template(1.0, "0.25M")
    bound = KVEviction().bind(schedule, toy("square").model.shape)
    gone = [bound.plan(scale, None, None)[0].evict for scale in range(10)]
    assert gone == [()] * 7 + [(4,), (5,), ()]
    held, policy = set(), KVEviction()
    for scale in range(10):
        assert sorted(held) == list(seen_by(policy, scale))
        held = (held | {scale}) - set(gone[scale])


def test_window_as_long_as_the_schedule_is_full():
    full = cached_run("full", "odd")
    for policy in (KVEviction(window=4, keep_first=0), KVEviction(keep_first=4, window=0), KVEviction.neutral()):
        result = run(toy("odd"), policy)
        assert same_bits(result, full)
        assert result.trace.cost == full.trace.cost
        assert result.bound.directives == ()


# Memory and cost


@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@spec
def test_memory_is_allocated_at_what_the_rule_holds_and_counted(policy: KVEviction, name: str):
    """Per block and row: while a stored scale runs, it and what it sees; the last one lies in the scratch."""
    subject = toy(name)
    shape, request = subject.model.shape, make_request(subject.schedule)
    bound = policy.bind(subject.schedule, shape)
    limits = bounds_of(bound, request, shape)
    tokens = [scale.num_tokens for scale in subject.schedule.scales]
    most = max(tokens[s] + sum(tokens[e] for e in seen_by(policy, s)) for s in range(4))
    assert limits.capacities == (most,) * 5
    result = run(subject, bound, request)
    assert result.trace.peak_kv_bytes == limits.kv_bytes(shape.width, 4) == 2 * 6 * 64 * 4 * (6 * most + tokens[4])
    assert bound.is_static
    assert forecast(bound, request, shape) == result.trace.cost
    assert result.trace.cost.kv_bytes == 2 * 6 * 64 * 4 * 5 * most
    full = cached_run("full", name).trace
    # With two first ones and one more, scale 3 still sees all: only the last scale reads less.
    assert (result.trace.peak_kv_bytes < full.peak_kv_bytes) == (policy.keep_first < 2)
    assert result.trace.cost.flops < full.cost.flops


@spec
def test_flops_lose_the_products_with_keys_that_are_gone(policy: KVEviction):
    tokens = [scale.num_tokens for scale in toy("wide").schedule.scales]
    lost = sum(tokens[s] * sum(tokens[e] for e in range(s) if e not in seen_by(policy, s)) for s in range(5))
    # Two products per pair of tokens, two operations per number of the width, in every row and block.
    full, ours = cached_run("full", "wide").trace.cost, run(toy("wide"), policy).trace.cost
    assert full.flops - ours.flops == 2 * 2 * lost * 64 * 6 * 5


@spec
def test_cache_holds_what_the_rule_says_after_every_scale(policy: KVEviction):
    subject = toy("odd")
    tokens = [scale.num_tokens for scale in subject.schedule.scales]
    engine = Engine(subject.model, subject.tokenizer)
    bound = SpyBound(policy.bind(subject.schedule, subject.model.shape))
    state = engine.open(bound, make_request(subject.schedule))
    for scale in range(4):
        engine.step([state])
        seen = seen_by(policy, scale + 1)
        assert [index for index, _ in state.cache.scales] == list(seen)
        assert state.cache.lengths == [[sum(tokens[s] for s in seen)] * 6] * 5
        assert max(part.shape[2] for part in state.cache.k_RNMD) == state.limits.capacities[0]


# Promises


def test_model_without_a_cache_reports_no_effect():
    subject = toy("wide")
    model = copy.copy(subject.model)
    model.shape = replace(model.shape, is_cached=False)
    forgetful = replace(subject, model=model)
    result = run(forgetful, KVEviction(keep_first=1, window=1))
    assert result.trace.unfired == ("evict keys",)
    assert same_bits(result, run(forgetful, load_policy("full")))
    assert run(subject, KVEviction(keep_first=1, window=1)).trace.unfired == ()


def test_schedule_that_no_scale_leaves_promises_nothing():
    assert cached_run("kv-eviction", "square").bound.directives == ()
    bound = KVEviction().bind(ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape)
    assert [d.value for d in bound.directives] == ["evict keys"]


@pytest.mark.parametrize("field", ["keep_first", "window"])
def test_wrong_settings_are_refused_by_name(field: str):
    with pytest.raises(FoveateError, match=f"{field} must be 0 or more, got -1"):
        checked(KVEviction(), field, -1)
