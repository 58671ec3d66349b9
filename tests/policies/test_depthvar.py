"""DepthVAR against plain Python loops: order of blocks, scores and their budget, and what skipped blocks add."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import CachedFill, KeepOutputs
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import BlockChange, Signals
from foveate.policies.depthvar import DepthVAR, apply_curve, bit_reversal_order, depth_scores
from tests.engine.naive import decisions_of, generate_planned
from tests.randomness import normal
from tests.toys import LENGTHS, SEEDS, cached_run, checked, make_request, run, same_bits, text_features, toy

CURVES = ("power", "linear", "step", "constant")


def shape_of(num_blocks: int) -> ModelShape:
    return ModelShape(
        num_blocks=num_blocks, width=8, ff_width=8, num_heads=1, head_width=8, head_outputs=2, input_channels=1
    )


def noise(seed: int, *shape: int) -> torch.Tensor:
    return normal(*shape, stream=seed)


# Order


def loop_reversal(num_blocks: int) -> list[int]:
    size = 1
    while size < num_blocks:
        size *= 2
    order = []
    for i in range(size):
        value, rest, bit = 0, i, size // 2
        while rest:
            value, rest, bit = value + bit * (rest % 2), rest // 2, bit // 2
        if value < num_blocks:
            order.append(value)
    return order


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 12, 16, 24, 30, 32, 40])
def test_order_equals_the_loop_and_names_every_block_once(num_blocks: int):
    order = bit_reversal_order(num_blocks)
    assert list(order) == loop_reversal(num_blocks)
    assert sorted(order) == list(range(num_blocks))


def test_published_prefixes():
    assert bit_reversal_order(32)[:5] == (0, 16, 8, 24, 4)
    assert bit_reversal_order(40)[:10] == (0, 32, 16, 8, 24, 4, 36, 20, 12, 28)
    assert bit_reversal_order(24)[:8] == (0, 16, 8, 4, 20, 12, 2, 18)


# Scores


def loop_scores(change: list[float], budget: float, shift: int, curve: str) -> list[float]:
    """One token at a time: how many changed less, rotated by whole ranks, through the curve."""
    n, scores = len(change), []
    for i, value in enumerate(change):
        rank = sum(other < value or (other == value and j < i) for j, other in enumerate(change))
        rho = ((rank - shift) % n + 0.5) / n
        if curve == "power":
            scores.append(rho ** (1 / budget - 1))
        elif curve == "linear" and budget <= 0.5:
            scores.append(max(0.0, (rho - 1 + 2 * budget) / (2 * budget)))
        elif curve == "linear":
            scores.append(2 * budget - 1 + 2 * (1 - budget) * rho)
        elif curve == "step":
            scores.append(1.0 if rho >= 1 - budget else 0.0)
        else:
            scores.append(budget)
    return scores


@settings(deadline=None, max_examples=60)
@given(
    change=st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30),
    budget=st.sampled_from([0.07, 0.25, 0.5, 0.625, 0.9]),
    share=st.floats(0, 0.99),
    curve=st.sampled_from(CURVES),
)
def test_scores_equal_the_loop(change: list[float], budget: float, share: float, curve: str):
    shift = int(share * len(change))
    ours = depth_scores(torch.tensor([change]), budget, shift / len(change), curve)[0]
    expected = torch.tensor(loop_scores(change, budget, shift, curve), dtype=torch.float64)
    assert torch.allclose(ours, expected, atol=1e-12)
    assert ours.min() >= 0
    assert ours.max() <= 1


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 0.6, 0.9, 1.0])
def test_mean_score_is_the_budget_whatever_the_rotation(curve: str, budget: float):
    change = noise(0, 2, 400)
    plain = depth_scores(change, budget, 0.0, curve)
    assert plain.mean().item() == pytest.approx(budget, abs=2e-3)
    for rotation in (0.1, 1 / 3, 0.777):
        rotated = depth_scores(change, budget, rotation, curve)
        assert torch.equal(rotated.sort().values, plain.sort().values)
    if curve in ("power", "linear") and budget < 1:
        assert not torch.equal(depth_scores(change, budget, 0.5, curve), plain)


def test_more_change_goes_deeper_and_ties_go_by_index():
    scores = depth_scores(torch.tensor([[0.2, 0.9, 0.2, 0.5]]), 0.4)[0]
    assert scores.argsort().tolist() == [0, 2, 3, 1]
    assert torch.equal(depth_scores(noise(0, 1, 9), 1.0), torch.ones(1, 9).double())


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_curves_have_the_budget_as_their_integral(budget: float):
    rho = ((torch.arange(100_000) + 0.5) / 100_000).double()[None]
    for curve in CURVES:
        assert apply_curve(rho, budget, curve).mean().item() == pytest.approx(budget, abs=1e-4)


# Depths


def planned(policy: DepthVAR, num_blocks: int, change_Bl: torch.Tensor, scale: int):
    schedule = ScaleSchedule.from_grids([(n, n) for n in (1, 2, 4, 6, 8, 12, 16)])
    bound = policy.bind(schedule, shape_of(num_blocks))
    side = math.isqrt(change_Bl.shape[-1])
    values = {record: torch.zeros_like(change_Bl) for record in bound.record(scale - 1)}
    values = {record: change_Bl if record.first == 0 else zero for record, zero in values.items()}
    signals = Signals(scale=scale - 1, grid=(side, side), values=values)
    return bound, bound.plan(scale, signals, bound.start())[0]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rotation", ["even", "round-robin", "none"])
def test_sum_of_depths_is_near_the_budget_and_rotation_does_not_move_it(curve: str, rotation: str):
    for num_blocks, scale in itertools.product((12, 24, 32), (4, 5, 6)):
        policy = DepthVAR(curve=curve, rotation=rotation)
        bound, plan = planned(policy, num_blocks, noise(1, 1, 36), scale)
        num_tokens = bound.schedule.scales[scale].num_tokens
        depth_Bl = plan.depths[0].depth_Bl
        # One depth for all can only be a whole number of blocks.
        slack = 0.5 * num_tokens if curve == "constant" else 0.08 * 36 * num_blocks
        assert depth_Bl.sum().item() == pytest.approx(36 * num_blocks, abs=slack)
        assert bound.budgets[scale] == 36 / num_tokens
        plain = planned(policy.replace(rotation="none"), num_blocks, noise(1, 1, 36), scale)[1]
        assert int(plain.depths[0].depth_Bl.sum()) == int(depth_Bl.sum())


def test_rotation_moves_by_a_share_of_the_dynamic_scales():
    bound, _ = planned(DepthVAR(), 12, noise(1, 1, 36), 4)
    assert [bound.rotation(scale) for scale in (4, 5, 6)] == [0.0, 1 / 3, 2 / 3]
    bound, _ = planned(DepthVAR(rotation="round-robin"), 12, noise(1, 1, 36), 4)
    assert [bound.rotation(scale) for scale in (4, 5, 6)] == pytest.approx([0.0, 36 / 64, 36 / 64 + 36 / 144])
    bound, _ = planned(DepthVAR(rotation="none"), 12, noise(1, 1, 36), 4)
    assert [bound.rotation(scale) for scale in (4, 5, 6)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("policy", [DepthVAR(), DepthVAR(rounding=0.0, order="prefix"), DepthVAR(blend="depth")])
def test_depths_come_from_the_enlarged_change_one_token_at_a_time(policy: DepthVAR):
    change = noise(2, 2, 16).square()
    bound, plan = planned(policy, 12, change, 5)
    large = torch.nn.functional.interpolate(
        change.double().view(2, 1, 4, 4), size=(12, 12), mode="bilinear", align_corners=False
    ).flatten(1)
    for image in range(2):
        scores = loop_scores(large[image].tolist(), 36 / 144, round(144 / 3), "power")
        depths = [min(12, math.floor(score * 12 + policy.rounding)) for score in scores]
        assert plan.depths[0].depth_Bl[image].tolist() == depths
        weights = scores if policy.blend == "score" else [depth / 12 for depth in depths]
        assert torch.allclose(plan.weight_Bl[image], torch.tensor(weights), atol=1e-6)
    assert plan.fill == CachedFill()
    assert plan.depths[0].order == (bound.order if policy.order == "bit-reversal" else tuple(range(12)))


@pytest.mark.parametrize("curve", ["power", "linear"])
def test_literal_floor_never_runs_the_last_block_and_misses_the_budget(curve: str):
    for scale in (4, 5, 6):
        bound, plan = planned(DepthVAR(rounding=0.0, curve=curve), 12, noise(3, 1, 36), scale)
        assert not plan.active(bound.order[-1]).any()
        rounded = planned(DepthVAR(curve=curve), 12, noise(3, 1, 36), scale)[1]
        assert rounded.active(bound.order[-1]).any()
    # At 256 tokens and a budget of 36 / 256 the loss is larger than the 13-15 % that half budgets lose.
    half = depth_scores(noise(4, 1, 4000), 0.5, 0.0, curve)
    assert ((half * 12).floor().sum() / (half.sum() * 12)).item() == pytest.approx(0.916, abs=0.05)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.integers(4, 6), curve=st.sampled_from(CURVES))
def test_counts_per_block_do_not_depend_on_content(seed: int, scale: int, curve: str):
    """They are those of the ceiling, so they are known before the run."""
    bound, plan = planned(DepthVAR(curve=curve), 12, noise(seed, 2, 36), scale)
    ceiling = bound.ceiling(scale)
    for block in range(12):
        assert plan.active(block).sum(-1).tolist() == [int(ceiling.active(block).sum())] * 2
    assert bound.is_static


def test_active_tokens_shrink_along_the_order():
    bound, plan = planned(DepthVAR(), 12, noise(5, 1, 36), 6)
    masks = [plan.active(block)[0] for block in bound.order]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(masks))


# Settings


def test_budget_speedup_is_as_the_paper_implies():
    long, short = (ScaleSchedule.from_template(1.0, budget) for budget in ("1M", "0.06M"))
    assert DepthVAR().bind(long, shape_of(12)).budget_speedup == pytest.approx(1.88, abs=0.05)
    assert DepthVAR(reference_scale=7).bind(long, shape_of(12)).budget_speedup == pytest.approx(3.6, abs=0.15)
    assert DepthVAR().bind(short, shape_of(12)).budget_speedup == pytest.approx(3.2, abs=0.1)
    assert DepthVAR.neutral().bind(long, shape_of(12)).budget_speedup == 1.0


def test_a_plan_without_its_signal_is_refused_by_name():
    bound, _ = planned(DepthVAR(), 12, noise(0, 1, 36), 4)
    with pytest.raises(PlanConflictError, match="block changes, and no scale ran before it"):
        bound.plan(4, None, None)
    with pytest.raises(PlanConflictError, match="BlockChange.* was not recorded at scale 3"):
        bound.plan(4, Signals(scale=3, grid=(6, 6)), None)


def test_signals_are_recorded_from_the_reference_to_the_last_but_one():
    bound, _ = planned(DepthVAR(), 12, noise(0, 1, 36), 4)
    wanted = [bool(bound.record(scale)) for scale in range(7)]
    assert wanted == [False, False, False, True, True, True, False]
    assert bound.record(3) == {BlockChange(first=b, end=b + 1) for b in range(len(bound.order))}
    assert bound.keeps(3) == {KeepOutputs()}
    assert bound.dynamic == [4, 5, 6]


@pytest.mark.parametrize("reference", [7, -8])
def test_reference_must_be_a_scale(reference: int):
    with pytest.raises(FoveateError, match=rf"reference_scale must be in \[-7, 6\] .*, got {reference}"):
        planned(DepthVAR(reference_scale=reference), 12, noise(0, 1, 36), 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("curve", "cubic"), ("rotation", "odd"), ("rounding", 1.0), ("order", "random"), ("fill", "mean"), ("blend", "x")],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be"):
        checked(DepthVAR(), field, value)


# In the engine


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize("policy", [DepthVAR(), DepthVAR(reference_scale=2, curve="linear", blend="depth")])
def test_filled_tokens_add_the_resized_change_of_the_same_block(policy: DepthVAR, name: str):
    """Against token lists: latents, and the change per token that the next scores are made of."""
    subject = toy(name)
    request = make_request(subject.schedule)
    result = run(subject, policy, request)
    page = generate_planned(subject, text_features(SEEDS[1], LENGTHS[1]), SEEDS[1], decisions_of(result, 1), request)
    assert torch.allclose(result.f_hat[1], page.f_hats[-1][0], atol=1e-4)
    compared = 0
    for scale in range(4):
        values = result.bound.signals[scale + 1].values
        if values:
            change_Bl = sum(values.values())
            assert torch.allclose(change_Bl[1], torch.tensor(page.changes[scale]), rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == {-4: 3, 2: 2}[policy.reference_scale]


def test_codes_are_weighted_by_the_score():
    result = run(toy("square"), DepthVAR())
    step = result.f_hats[4] - result.f_hats[3]
    weight_Bl = result.bound.plans[4].weight_Bl
    expected = weight_Bl.view(3, 1, 8, 8).expand(-1, 8, -1, -1) * 8**-0.5
    assert torch.allclose(step.abs(), expected, atol=1e-5)


def test_branches_are_filled_from_their_own_changes():
    """If both branches were filled alike, guidance would see less difference than it does."""
    subject = toy("square")
    policy = DepthVAR(curve="constant", reference_scale=3)
    guided = run(subject, policy)
    single = run(subject, policy, make_request(subject.schedule, weights=(1.0,) * 5))
    assert not torch.equal(guided.choices[4].logits[0], single.choices[4].logits[0])


@pytest.mark.parametrize("policy", [DepthVAR.neutral(), DepthVAR(reference_scale=4)])
def test_budget_of_one_is_full_bit_for_bit(policy: DepthVAR):
    assert same_bits(run(toy("square"), policy), cached_run("full", "square"))


def test_equal_grids_after_the_reference_run_in_full():
    schedule = ScaleSchedule.from_grids(((1, 1), (2, 2), (4, 4), (4, 4), (8, 8)))
    bound = DepthVAR(reference_scale=2).bind(schedule, shape_of(12))
    assert bound.dynamic == [4]
    assert bound.budgets == [1.0, 1.0, 1.0, 1.0, 0.25]
