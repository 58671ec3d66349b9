"""Fovea against a slow twin, image by image and token by token: spread logits, own numbers, confidence, guidance."""

from dataclasses import replace

import pytest
import torch

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import Base, ScalePlan, Spread, SpreadDifference
from foveate.engine.executor import Engine
from foveate.engine.forecast import forecast
from foveate.engine.sample import Filter, ForcedSampler, KeyedSampler, ReferenceSampler
from foveate.engine.spread import confidence, spread
from foveate.policies.drop_branch import DropBranch
from foveate.policies.fovea import Fovea
from foveate.policies.full import Full
from foveate.policies.registry import load_policy
from foveate.policies.step_down import StepDown
from tests.policies.lattices import lowest
from tests.policies.twins import around, assert_same, full_steps, generate_image, trust
from tests.randomness import generator as seeded
from tests.toys import (
    SEEDS,
    FixedBound,
    Toy,
    cached_run,
    checked,
    label_request,
    make_request,
    run,
    same_bits,
    toy,
    toy_var,
)

# Slow twins


def steps_of(subject: Toy, policy: Fovea):
    """What every scale of an image runs."""
    steps, num_scales = full_steps(subject), len(subject.schedule)
    word = Spread(sigma=policy.sigma, likeness=policy.likeness, softness=policy.softness)
    for scale in range(1, num_scales):
        grid, steps_left = subject.schedule.grids[scale], num_scales - scale
        share = policy.shares[-steps_left] if steps_left <= len(policy.shares) else 1.0
        part = policy.guided_shares[-steps_left] if steps_left <= len(policy.guided_shares) else 1.0
        kept = lowest(grid, share)
        steps[scale] = replace(
            steps[scale],
            kept=kept,
            guided=lowest(grid, part, kept) if part else (),
            spread=word,
            spread_difference=SpreadDifference(sigma=policy.sigma, likeness=policy.guidance_likeness),
        )
    return steps


SETTINGS = [
    Fovea(),
    Fovea(shares=(0.5, 0.25, 0.4), guided_shares=(0.5, 0.5)),
    Fovea(shares=(0.1,), guided_shares=(0.7, 0.2), sigma=2.0, likeness=0.8, softness=0.3),
    Fovea(shares=(0.6,), guided_shares=(0.5, 0.0), guidance_likeness=5.0),
    Fovea(shares=(), guided_shares=(0.25,)),
    Fovea(shares=(0.5, 0.5), guided_shares=(), likeness=1e4, softness=1e-3),
]


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["odd", "wide", "patches", "square"])
@pytest.mark.parametrize("policy", SETTINGS, ids=lambda policy: policy.spec)
def test_run_equals_the_twin(policy: Fovea, name: str):
    subject, request = toy(name), make_request(toy(name).schedule)
    result = run(subject, policy, request)
    page = generate_image(subject, request, 1, steps_of(subject, policy))
    assert result.trace.unfired == ()
    assert_same(result, page, 1)
    assert not torch.equal(result.f_hat, cached_run("full", name).f_hat)


@pytest.mark.parametrize("rule", [Filter(top_k=0, top_p=0.8), Filter(top_k=1, top_p=0.0), Filter(top_k=1, top_p=0.7)])
def test_filters_act_on_spread_logits(rule: Filter):
    subject = toy("odd")
    request = make_request(subject.schedule, rule=rule)
    assert_same(run(subject, Fovea(), request), generate_image(subject, request, 2, steps_of(subject, Fovea())), 2)


def test_difference_of_codebooks_is_spread_over_head_inputs_or_logits():
    subject, policy = toy_var(), Fovea(shares=(), guided_shares=(0.5, 0.4))
    request = label_request(subject.schedule)
    assert_same(run(subject, policy, request), generate_image(subject, request, 1, steps_of(subject, policy)), 1)


# The formulas


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 4), (9, 7), (5, 12)])
def test_spread_equals_the_definition(grid: tuple[int, int]):
    generator = seeded(grid[0] * 100 + grid[1])
    num_tokens = grid[0] * grid[1]
    for share in (0.1, 0.5, 1.0):
        kept = torch.rand(num_tokens, generator=generator) < share
        kept[int(torch.randint(num_tokens, (1,), generator=generator))] = True
        index_k = kept.nonzero().flatten()
        values_kW = torch.randn(len(index_k), 3, generator=generator)
        input_Zhw = torch.randn(4, *grid, generator=generator)
        mean_lW, weight_l = spread(values_kW, index_k, input_Zhw, 1.3, 0.6)
        means = around(dict(zip(index_k.tolist(), values_kW, strict=True)), input_Zhw, 1.3, 0.6)
        assert set(means) == set((weight_l > 0).nonzero().flatten().tolist())
        for token in range(num_tokens):
            expected = means.get(token, torch.zeros(3, dtype=torch.float64))
            assert torch.allclose(mean_lW[token].double(), expected, atol=1e-4)


def test_input_that_is_the_same_everywhere_leaves_distance_alone():
    means, weight_l = spread(torch.tensor([[1.0], [4.0]]), torch.tensor([0, 2]), torch.ones(2, 1, 9), 1.0, 0.3)
    assert means[:, 0].isfinite().all()
    assert means[1, 0].item() == pytest.approx(2.5)
    assert means[0, 0].item() == pytest.approx(4.0)
    assert (weight_l > 0).tolist() == [True] * 6 + [False] * 3


def test_confidence_is_the_best_factor_between_0_and_1():
    generator = seeded(1)
    for tilt in (-1.0, 0.3, 5.0):
        estimate = torch.randn(6, 4, generator=generator)
        true = tilt * estimate + 0.1 * torch.randn(6, 4, generator=generator)
        found = float(confidence(true, estimate))
        assert found == pytest.approx(trust([(true, estimate.double())]), abs=1e-6)
        errors = [float((true - factor * estimate).square().sum()) for factor in torch.linspace(0, 1, 101).tolist()]
        assert float((true - found * estimate).square().sum()) <= min(errors) + 1e-4
    assert float(confidence(torch.ones(2, 2), torch.zeros(2, 2))) == 0.0


# What a sampler must know


def test_thresholds_say_what_is_drawn_and_leave_the_random_state_alone():
    logits = torch.randn(2, 12, 5, 2, generator=seeded(2))
    for sampler in (
        KeyedSampler(seeds=(4, 9)),
        ReferenceSampler(generator=torch.Generator().manual_seed(6)),
    ):
        thresholds = torch.stack(sampler.thresholds(3, (3, 4), 2, 5))
        again = torch.stack(sampler.thresholds(3, (3, 4), 2, 5))
        assert torch.equal(thresholds, again)
        drawn = torch.stack(sampler.choose(3, (3, 4), list(logits), None, Filter(top_k=0, top_p=0.0)))
        assert torch.equal(drawn.bool(), logits[..., 1] - logits[..., 0] > thresholds)


def test_spreading_draws_nothing_more_from_a_generator():
    """Whatever stands in a token's place, the generator ends where it ends after the full run."""
    subject, states = toy("square"), []
    for policy in (load_policy("full"), Fovea(), load_policy("random-tokens:fill=zero")):
        sampler = ReferenceSampler(generator=torch.Generator().manual_seed(5))
        run(subject, policy, make_request(subject.schedule, sampler=sampler))
        states.append(sampler.generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_sampler_without_draws_is_refused():
    subject, full = toy("square"), cached_run("full", "square")
    forced = ForcedSampler(symbols=tuple(torch.stack(full.choices[s].symbols) for s in range(5)))
    with pytest.raises(PlanConflictError, match="own random numbers"):
        run(subject, Fovea(), make_request(subject.schedule, sampler=forced))


# What is refused, and what is known before the run


def test_codebooks_are_refused_before_anything_runs():
    subject = toy_var()
    engine = Engine(subject.model, subject.tokenizer)
    bound = Fovea().bind(subject.schedule, subject.model.shape)
    with pytest.raises(PlanConflictError, match="Fovea: logits are spread bit by bit.*id of a codebook"):
        engine.open(bound, label_request(subject.schedule))
    later = StepDown(steps=(Full(), Fovea()), needs_ms=((2.0,) * 5, (1.0,) * 5))
    with pytest.raises(PlanConflictError, match="StepDown: logits are spread bit by bit"):
        engine.open(later.bind(subject.schedule, subject.model.shape), label_request(subject.schedule))
    engine.open(Fovea.neutral().bind(subject.schedule, subject.model.shape), label_request(subject.schedule)).release()


def test_guidance_inside_the_blocks_is_refused_before_anything_runs():
    subject = toy("square")
    engine, request = Engine(subject.model, subject.tokenizer), make_request(subject.schedule, hidden_blocks=(2,))
    thin = Fovea(shares=(1.0,), guided_shares=(0.5,))
    for policy in (thin, StepDown(steps=(Full(), thin), needs_ms=((2.0,) * 5, (1.0,) * 5))):
        with pytest.raises(PlanConflictError, match="guidance inside the blocks needs both branches at every token"):
            engine.open(policy.bind(subject.schedule, subject.model.shape), request)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shares", (0.0,)),
        ("shares", (0.5, 1.1)),
        ("guided_shares", (-0.1,)),
        ("guided_shares", (0.0, 0.5)),
        ("sigma", 0.0),
        ("likeness", float("inf")),
        ("guidance_likeness", -1.0),
        ("softness", float("nan")),
    ],
)
def test_wrong_settings_are_refused(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be"):
        checked(Fovea(), field, value)


@pytest.mark.parametrize("field", ["sigma", "likeness", "softness"])
def test_plan_with_a_length_of_zero_is_refused(field: str):
    subject = toy("square")
    half = load_policy("random-tokens:fill=zero").bind(subject.schedule, subject.model.shape).plan(4, None, None)[0]
    plans = [*(ScalePlan() for _ in range(4)), replace(half, base=Spread(**{field: 0.0}))]
    with pytest.raises(PlanConflictError, match="base must be made of finite numbers above 0"):
        run(subject, FixedBound(plans))


@pytest.mark.parametrize("name", ["square", "odd", "patches"])
@pytest.mark.parametrize("policy", SETTINGS[:4], ids=lambda policy: policy.spec)
def test_cost_is_known_before_the_run(policy: Fovea, name: str):
    subject = toy(name)
    request = make_request(subject.schedule)
    bound = policy.bind(subject.schedule, subject.model.shape)
    trace = run(subject, bound, request).trace
    assert bound.is_static
    assert forecast(bound, request, subject.model.shape) == trace.cost


def test_more_scales_than_there_are_leave_the_first_whole():
    subject = toy("square")
    result = run(subject, Fovea(shares=(0.5,) * 9, guided_shares=(0.5,) * 9))
    assert result.choices[0].kept is None
    assert [len(result.choices[s].kept[0]) for s in range(1, 5)] == [2, 8, 18, 32]


# Composition


def test_the_cheaper_guidance_wins():
    part = SpreadDifference()
    tokens = Fovea(shares=(), guided_shares=(0.5,)).bind(toy("square").schedule, toy("square").model.shape)
    spread_plan, _ = tokens.plan(4, None, None)
    cached_plan, _ = (
        load_policy("cached-guidance").bind(toy("square").schedule, toy("square").model.shape).plan(4, None, None)
    )
    dropped, _ = DropBranch(count=1).bind(toy("square").schedule, toy("square").model.shape).plan(4, None, None)
    assert spread_plan.difference == part
    assert spread_plan.meet(ScalePlan()).difference == part
    assert (
        spread_plan.meet(cached_plan).difference == cached_plan.difference == cached_plan.meet(spread_plan).difference
    )
    assert spread_plan.meet(dropped).difference is None
    other = replace(spread_plan, difference=SpreadDifference(sigma=2.0))
    with pytest.raises(PlanConflictError, match="two ways to spread the difference"):
        spread_plan.meet(other)


def test_two_ways_to_spread_logits_are_refused_and_one_is_one():
    one, other = ScalePlan(base=Spread()), ScalePlan(base=Spread(sigma=2.0))
    assert one.meet(one).base == one.meet(ScalePlan(base=Base.ZERO)).base == Spread()
    with pytest.raises(PlanConflictError, match="two base maps for dropped tokens, spread logits"):
        one.meet(other)
    with pytest.raises(PlanConflictError, match="previous and spread logits"):
        one.meet(ScalePlan(base=Base.PREVIOUS))


def test_tokens_that_another_part_drops_are_spread_to_as_well():
    subject, policy = toy("odd"), Fovea(shares=(0.6,), guided_shares=())
    request = make_request(subject.schedule)
    result = run(subject, load_policy("random-tokens:fill=zero,num_scales=1,keep_ratio=0.6") | policy, request)
    steps = steps_of(subject, policy)
    kept = tuple(result.choices[4].kept[1].tolist())
    steps[4] = replace(steps[4], kept=kept, guided=kept)
    assert len(kept) < 0.4 * subject.schedule.scales[4].num_tokens
    assert_same(result, generate_image(subject, request, 1, steps), 1)


def test_base_weight_scales_what_is_spread():
    subject, policy = toy("odd"), Fovea(shares=(0.5,), guided_shares=())
    bound = policy.bind(subject.schedule, subject.model.shape)
    plans = [bound.plan(s, None, None)[0] for s in range(5)]
    halved = [*plans[:4], replace(plans[4], base_weight_Bl=torch.full((1, 1), 0.0))]
    zero = [*plans[:4], replace(plans[4], base=Base.ZERO)]
    assert torch.equal(run(subject, FixedBound(halved)).f_hat, run(subject, FixedBound(zero)).f_hat)


@pytest.mark.parametrize("name", ["square", "patches"])
def test_one_image_of_a_batch_equals_the_image_alone(name: str):
    subject = toy(name)
    together = run(subject, Fovea(), make_request(subject.schedule))
    for image, seed in enumerate(SEEDS):
        alone = run(subject, Fovea(), make_request(subject.schedule, (seed,), ((5, 9, 5)[image],)))
        assert torch.equal(alone.f_hat[0], together.f_hat[image])


def test_settings_of_one_are_the_full_run():
    full = cached_run("full", "square")
    assert same_bits(run(toy("square"), Fovea(shares=(1.0, 1.0), guided_shares=(1.0,))), full)
    assert same_bits(run(toy("square"), Fovea.neutral()), full)


@pytest.mark.parametrize("patch", [1, 2])
def test_shares_of_0_and_1_are_the_codes_of_bits(patch: int):
    tokenizer = toy("patches" if patch == 2 else "odd").tokenizer
    bits = torch.randint(2, (2, 6, 8 * patch**2), generator=seeded(3))
    assert torch.equal(tokenizer.residual(bits.float(), (2, 3)), tokenizer.residual(bits, (2, 3)))
    half = tokenizer.residual(torch.full_like(bits, 0.5, dtype=torch.float32), (2, 3))
    assert not half.any()


def test_composition_knows_its_counts_unless_two_parts_leave_tokens_out():
    subject = toy("square")
    for spec, is_static in (
        ("fovea|skip-scales", True),
        ("fovea|late-bfloat16", True),
        ("fovea|random-tokens:fill=zero", False),
    ):
        request, bound = make_request(subject.schedule), load_policy(spec).bind(subject.schedule, subject.model.shape)
        assert bound.is_static == is_static, spec
        cost = run(subject, bound, request).trace.cost
        assert forecast(bound, request, subject.model.shape) == cost or not is_static, spec
