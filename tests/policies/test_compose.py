"""Composition: a table of every ordered pair of registered policies, and the laws that composed policies obey."""

from functools import cache

import pytest
import torch

from foveate.core.composition import Composed
from foveate.core.errors import PlanConflictError
from foveate.core.plan import Base, CachedFill, ScalePlan
from foveate.core.schedule import ScaleSchedule
from foveate.engine.state import Request
from foveate.policies.full import Full
from foveate.policies.ld_pruning import LDPruning
from foveate.policies.registry import REGISTRY, load_policy
from foveate.testing.contract import as_data
from tests.policies.test_contract import SHAPE, plans_of
from tests.toys import GRIDS, LENGTHS, SEEDS, cached_run, make_request, run, same_bits, toy

FILLS = "two fills, {} and {}; keep one"
CACHED_FILL = r"the output of each block at the latest scale \(bilinear\)"

NAMES = (
    "full", "skip-scales", "drop-branch", "kv-eviction", "late-bfloat16", "cached-guidance", "skipvar", "ld-pruning",
    "random-tokens", "attention-entropy", "feature-magnitude", "token-variance", "depthvar", "uniform-depth",
    "blocks-per-scale", "fastvar", "sparsevar", "fovea", "step-down",
)  # fmt: skip

TABLE: dict[str, str] = {
    "full": "ooooooooooooooooooo",
    "skip-scales": "ooooooooooooooooooo",
    "drop-branch": "ooooooooooooooooooo",
    "kv-eviction": "ooooooooooooooooooo",
    "late-bfloat16": "ooooooooooooooooooo",
    "cached-guidance": "ooooooooooooooooooo",
    "skipvar": "ooooooooooooooooooo",
    "ld-pruning": "oooooooooooooooobbo",
    "random-tokens": "oooooooooooooooobbo",
    "attention-entropy": "oooooooooooooooobbo",
    "feature-magnitude": "oooooooooooooooobbo",
    "token-variance": "oooooooooooooooobbo",
    "depthvar": "ooooooooooooooofooo",
    "uniform-depth": "ooooooooooooooofooo",
    "blocks-per-scale": "ooooooooooooooofooo",
    "fastvar": "oooooooooooofffoooo",
    "sparsevar": "ooooooobbbbboooocbo",
    "fovea": "ooooooobbbbbooooboo",
    "step-down": "ooooooooooooooooooo",
}
"""Row | column in the order of NAMES: o goes together, the others are refused for a reason below."""

REASONS = {"f": "two fills", "b": "two base maps for dropped tokens", "c": "two maps of tokens to copy from"}

OTHER_FILL: dict[str, str] = {
    "full": "oooo",
    "ld-pruning": "oooo",
    "depthvar": "oxox",
    "depthvar:fill=identity": "xoxo",
    "skip-scales": "oooo",
    "drop-branch": "oooo",
    "random-tokens": "oooo",
    "random-tokens:fill=zero": "oooo",
    "ld-pruning:fill=zero": "oooo",
    "uniform-depth": "oxox",
    "uniform-depth:fill=identity": "xoxo",
}
"""Row | (depthvar, depthvar:fill=identity, uniform-depth, uniform-depth:fill=identity): x is refused, two fills."""

FILLERS = ("depthvar", "depthvar:fill=identity", "uniform-depth", "uniform-depth:fill=identity")

PAIRS = [(a, b) for a in NAMES for b in NAMES]

SCHEDULES = ("wide", "patches")
"""Pairs that go together run on these in turn."""


def test_table_names_every_registered_policy():
    assert set(NAMES) == set(REGISTRY) == set(TABLE)
    assert all(len(row) == len(NAMES) for row in TABLE.values())
    assert len(PAIRS) == len(REGISTRY) ** 2


@cache
def flops_of(spec: str, name: str) -> int:
    """FLOPs of one image."""
    return run(toy(name), load_policy(spec), one_image(name)).trace.cost.flops


def one_image(name: str) -> Request:
    return make_request(toy(name).schedule, SEEDS[:1], LENGTHS[:1])


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.soak) for turn in (1, 2))])
@pytest.mark.parametrize("first", NAMES)
def test_every_ordered_pair_goes_together_and_runs_or_is_refused(first: str, turn: int):
    """Both orders are bound, and refused with the reason of the table; of each three pairs one runs, in one order."""
    for index, second in enumerate(NAMES):
        verdict, policy, name = TABLE[first][index], load_policy(f"{first}|{second}"), SCHEDULES[index % 2]
        if verdict != "o":
            for subject in map(toy, SCHEDULES):
                with pytest.raises(PlanConflictError, match=f"{first} . {second}: {REASONS[verdict]}"):
                    policy.bind(subject.schedule, subject.model.shape)
            continue
        policy.bind(toy(name).schedule, SHAPE)
        if NAMES.index(first) > index or (NAMES.index(first) + index) % 3 != turn:
            continue
        result = run(toy(name), policy, one_image(name))
        # Content decides anew where another policy changed the image, so a small surplus over the parts is possible.
        slack = 1.0 if result.bound.is_static or "full" in (first, second) else 1.1
        assert result.trace.cost.flops <= slack * min(flops_of(part, name) for part in (first, second)), policy.spec
        assert torch.isfinite(result.f_hat).all(), policy.spec


@pytest.mark.parametrize("first", list(OTHER_FILL))
def test_two_fills_are_refused_by_name_before_the_run(first: str):
    for second, verdict in zip(FILLERS, OTHER_FILL[first], strict=True):
        policy = load_policy(f"{first}|{second}")
        if verdict == "o":
            policy.bind(toy("square").schedule, SHAPE)
            continue
        fills = ["nothing" if "identity" in spec else CACHED_FILL for spec in (first, second)]
        names = [spec.partition(":")[0] for spec in (first, second)]
        message = rf"{names[0]} \| {names[1]}: " + FILLS.format(*fills)
        with pytest.raises(PlanConflictError, match=message):
            policy.bind(toy("square").schedule, SHAPE)


def test_conflict_names_the_policy_that_came_last():
    policy = load_policy("depthvar|skip-scales|uniform-depth:fill=identity")
    with pytest.raises(PlanConflictError, match=r"^depthvar \| skip-scales \| uniform-depth: two fills"):
        policy.bind(toy("square").schedule, SHAPE)


def test_fills_on_different_scales_do_not_meet():
    """Conflicts are about scales, not about names: here only the last scale has both."""
    schedule = toy("square").schedule
    apart = load_policy("depthvar:reference_scale=3|uniform-depth:fill=identity,num_scales=0")
    assert apart.bind(schedule, SHAPE)
    with pytest.raises(PlanConflictError):
        load_policy("depthvar:reference_scale=3|uniform-depth:fill=identity,num_scales=1").bind(schedule, SHAPE)


# Laws


@pytest.mark.parametrize(("first", "name"), [(name, SCHEDULES[i % 2]) for i, name in enumerate(NAMES)])
def test_full_is_neutral_on_either_side(first: str, name: str):
    alone = cached_run(first, name)
    left, right = run(toy(name), Full() | load_policy(first)), run(toy(name), load_policy(first) | Full())
    assert same_bits(left, alone)
    assert same_bits(right, alone)
    assert left.trace.unfired == right.trace.unfired == alone.trace.unfired


@pytest.mark.parametrize("name", list(GRIDS))
def test_neutral_parts_together_equal_full(name: str):
    full = cached_run("full", name)
    parts = [kind.neutral() for kind in REGISTRY.values()]
    assert same_bits(run(toy(name), Composed(parts=tuple(parts))), full)
    assert same_bits(run(toy(name), Composed.neutral()), full)


@pytest.mark.parametrize("first", NAMES)
def test_neutral_pairs_plan_what_full_does(first: str):
    """In either order; the engine sees nothing but plans, so one of the pairs is run."""
    schedule = toy("odd").schedule
    for second in NAMES:
        pair = REGISTRY[first].neutral() | REGISTRY[second].neutral()
        bound = pair.bind(schedule, SHAPE)
        assert bound.directives == ()
        for scale, plan in enumerate(plans_of(bound, schedule)):
            num_tokens = schedule.scales[scale].num_tokens
            assert as_data(plan, num_tokens, 5) == as_data(ScalePlan(), num_tokens, 5), pair.spec
            assert not bound.record(scale)
            assert not bound.keeps(scale)
    assert same_bits(run(toy("odd"), pair), cached_run("full", "odd"))


def test_masks_intersect_and_each_selection_ranks_the_survivors():
    schedule = ScaleSchedule.from_template(1.0, "0.06M")
    pair = load_policy("random-tokens:keep_ratio=0.5|random-tokens:keep_ratio=0.5,key=1").bind(schedule, SHAPE)
    first = load_policy("random-tokens:keep_ratio=0.5").bind(schedule, SHAPE)
    for scale in (4, 5, 6):
        num_tokens = schedule.scales[scale].num_tokens
        both = plans_of(pair, schedule)[scale].keep(1, num_tokens)
        one = plans_of(first, schedule)[scale].keep(1, num_tokens)
        assert not (both & ~one).any()
        assert int(both.sum()) == num_tokens // 4


def test_depths_take_the_minimum_and_weights_multiply():
    schedule = ScaleSchedule.from_template(1.0, "0.06M")
    specs = ("depthvar", "depthvar:curve=linear,rotation=none", "depthvar|depthvar:curve=linear,rotation=none")
    a, b, both = (plans_of(load_policy(spec).bind(schedule, SHAPE), schedule)[5] for spec in specs)
    depth_Bl = torch.minimum(a.depths[0].depth_Bl, b.depths[0].depth_Bl)
    ran = sum(both.active(block).long() for block in range(SHAPE.num_blocks))
    assert torch.equal(ran, depth_Bl)
    assert torch.allclose(both.weight_Bl, a.weight_Bl * b.weight_Bl)
    assert both.fill == CachedFill()


def test_branches_intersect():
    result = run(toy("square"), load_policy("drop-branch:count=3|ld-pruning:sats_threshold=1e-9"))
    other = run(toy("square"), load_policy("ld-pruning:sats_threshold=1e-9|drop-branch:count=3"))
    for ran in (result, other):
        assert [(0, False) in scale.work.rows for scale in ran.trace.scales] == [True, True, False, False, False]
    assert same_bits(result, other)


def test_scales_run_where_all_parts_let_them():
    result = run(toy("square"), load_policy("skip-scales:count=1|ld-pruning:skip_last=2|skip-scales:count=0"))
    assert [scale.ran for scale in result.trace.scales] == [True, True, True, False, False]


def test_dropped_tokens_of_a_pair_have_a_base_and_no_fill():
    """LDPruning | DepthVAR: kept tokens have depths and weights, dropped ones repeat the previous residual as it is."""
    result = run(toy("square"), load_policy("ld-pruning:sats=false|depthvar"))
    plan, kept = result.bound.plans[4], result.choices[4].kept
    assert plan.base is Base.PREVIOUS
    assert plan.fill == CachedFill()
    before = result.bound.signals[4].residual_BZhw
    step = result.f_hats[4] - result.f_hats[3]
    for image in range(3):
        mask = torch.zeros(64, dtype=torch.bool)
        mask[kept[image]] = True
        mask = mask.view(8, 8)
        base = torch.nn.functional.interpolate(before, size=(8, 8), mode="nearest")[image]
        assert torch.allclose(step[image][:, ~mask], base[:, ~mask], atol=1e-5)
        weight = plan.weight_Bl[image].view(8, 8) * 8**-0.5
        assert torch.allclose(step[image][:, mask].abs(), weight[mask].expand(8, -1), atol=1e-5)


def test_composition_is_a_policy_like_any_other():
    pair = LDPruning() | load_policy("skip-scales")
    assert pair.spec == "ld-pruning|skip-scales"
    assert (pair | Full()).parts_of() == (*pair.parts_of(), Full())
    assert Composed.neutral().bind(toy("square").schedule, SHAPE).directives == ()
    bound = pair.bind(toy("square").schedule, SHAPE)
    assert [d.value for d in bound.directives] == ["stop the unconditional branch", "drop tokens", "skip scales"]
    assert not bound.is_static
    assert load_policy("depthvar|skip-scales").bind(toy("square").schedule, SHAPE).is_static
