"""Words of a plan: masks beside scores, what stands for a branch, dtypes, eviction, bases; and refused plans."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.errors import PlanConflictError
from foveate.core.plan import (
    Base,
    BlockDtype,
    CachedDifference,
    CachedFill,
    DepthMap,
    Resize,
    ScalePlan,
    SublayerSelection,
    Unit,
    narrowed,
)
from foveate.core.plan_checker import PlanChecker
from foveate.core.selection import MaskSelection, Rule, TokenSelection

BF16, FP16 = torch.bfloat16, torch.float16
MASKS = st.lists(st.booleans(), min_size=1, max_size=20)


def mask(*values: int, kept: int | None = None) -> MaskSelection:
    return MaskSelection(mask_Bl=torch.tensor([values]).bool(), kept=kept)


def scored(*values: float, share: float, rule: Rule = Rule.COUNT) -> TokenSelection:
    return TokenSelection(score_Bl=torch.tensor([values]).double(), share=share, rule=rule)


def total(x_lC: torch.Tensor) -> torch.Tensor:
    return x_lC.sum(-1)


# Masks


@settings(max_examples=40)
@given(values=MASKS, survivors=st.data())
def test_mask_keeps_survivors_under_it(values: list[bool], survivors: st.DataObject):
    alive = [survivors.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))) for _ in range(2)]
    kept = mask(*values).narrow(torch.tensor(alive))
    assert kept.tolist() == [[a and v for a, v in zip(row, values, strict=True)] for row in alive]


def test_mask_says_its_count_only_where_everything_survived():
    known, unknown = mask(1, 0, 1, 0, kept=2), mask(1, 0, 1, 0)
    assert known.count(4, 4) == 2
    assert known.count(3, 4) is None
    assert unknown.count(4, 4) is None
    assert torch.equal(known.token_map, known.mask_Bl)
    assert torch.equal(known.on(torch.device("cpu")).mask_Bl, known.mask_Bl)
    assert known.on(torch.device("meta")).mask_Bl.device.type == "meta"
    assert known.on(torch.device("meta")).kept == 2


def test_masks_of_images_keep_what_is_theirs():
    selection = MaskSelection(mask_Bl=torch.tensor([[True, False, False], [False, True, True]]), kept=None)
    plan = ScalePlan(selections=(selection,))
    assert plan.keep(2, 3).tolist() == [[True, False, False], [False, True, True]]
    assert ScalePlan(selections=(mask(0, 1, 1),)).keep(2, 3).tolist() == [[False, True, True]] * 2


@settings(max_examples=40)
@given(values=MASKS, data=st.data(), share=st.sampled_from([0.25, 0.5, 0.7]))
def test_scores_rank_what_a_mask_leaves_and_masks_cut_what_scores_keep(
    values: list[bool], data: st.DataObject, share: float
):
    order = data.draw(st.permutations(range(len(values))))
    score = scored(*map(float, order), share=share)

    def best(tokens: list[int]) -> set[int]:
        return set(sorted(tokens, key=lambda t: -order[t])[: math.ceil(share * len(tokens) - 1e-9)])

    under = [t for t, value in enumerate(values) if value]
    first = ScalePlan(selections=(mask(*values), score)).keep(1, len(values))[0]
    assert set(first.nonzero().flatten().tolist()) == best(under)
    second = ScalePlan(selections=(score, mask(*values))).keep(1, len(values))[0]
    assert set(second.nonzero().flatten().tolist()) == best(list(range(len(values)))) & set(under)


def test_scores_by_count_know_their_number_among_survivors_and_shares_of_mass_do_not():
    assert [scored(1, 2, 3, 4, share=0.5).count(n, 4) for n in (4, 3, 1)] == [2, 2, 1]
    assert scored(1, 2, 3, 4, share=0.5, rule=Rule.MASS).count(4, 4) is None
    assert scored(1, 2, 3, 4, share=1.0, rule=Rule.MASS).count(3, 4) == 3


def test_no_selection_leaves_survivors_as_they_are():
    survivors = torch.tensor([[True, False]])
    assert narrowed((), None, 1, 2) is None
    assert narrowed((), survivors, 1, 2) is survivors
    assert narrowed((mask(1, 1),), survivors, 1, 2).tolist() == [[True, False]]


# Meeting


def test_default_plan_is_neutral_for_every_word():
    plan = ScalePlan(
        runs=False,
        unconditional=(True, False),
        guided_B=torch.tensor([True, False]),
        unconditional_tokens=(mask(1, 0, kept=1),),
        difference=CachedDifference(weight=0.5),
        selections=(mask(1, 1),),
        depths=(DepthMap(depth_Bl=torch.tensor([[1, 2]]), order=(0, 1)),),
        sublayers=(SublayerSelection(blocks=(0,), count=1, scorer=total),),
        fill=CachedFill(unit=Unit.SUBLAYER, source=1, resize=Resize.AREA),
        base=Base.COPY,
        source_Bl=torch.tensor([[0, 0]]),
        weight_Bl=torch.tensor([[0.5, 1.0], [1.0, 2.0]]),
        base_weight_Bl=torch.tensor([[0.25]]),
        evict=(0, 2),
        dtypes=(BlockDtype(dtype=BF16),),
    )
    for met in (plan.meet(ScalePlan()), ScalePlan().meet(plan)):
        for field in fields(ScalePlan):
            ours, theirs = getattr(met, field.name), getattr(plan, field.name)
            assert ours is theirs or ours == theirs, field.name
    assert all(getattr(plan, field.name) != field.default for field in fields(ScalePlan))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ScalePlan(unconditional=(False,), difference=CachedDifference(weight=0.5)), ScalePlan(), 0.5),
        (
            ScalePlan(unconditional=(False,), difference=CachedDifference(weight=0.5)),
            ScalePlan(unconditional_tokens=(mask(1, 0, kept=1),), difference=CachedDifference(weight=0.6)),
            0.3,
        ),
        (ScalePlan(unconditional=(False,), difference=CachedDifference()), ScalePlan(unconditional=(False,)), None),
        (ScalePlan(unconditional=(False,)), ScalePlan(), None),
        (ScalePlan(difference=CachedDifference()), ScalePlan(unconditional=(False,)), None),
        (
            ScalePlan(unconditional_tokens=(mask(1, 0, kept=1),), difference=CachedDifference()),
            ScalePlan(guided_B=torch.tensor([False])),
            1.0,
        ),
        (
            ScalePlan(unconditional_tokens=(mask(1, 0, kept=1),), difference=CachedDifference(weight=0.25)),
            ScalePlan(selections=(mask(1, 1),), evict=(0,)),
            0.25,
        ),
    ],
)
def test_the_cheaper_guidance_stays(a: ScalePlan, b: ScalePlan, expected: float | None):
    """Both branches > cached difference > the conditional branch alone; weights of two differences multiply.

    A branch that content stops says nothing about the difference: where it stopped before, a kept one is zero.
    """
    for met in (a.meet(b), b.meet(a)):
        assert (None if met.difference is None else met.difference.weight) == (
            None if expected is None else pytest.approx(expected)
        )


def test_branches_and_their_tokens_intersect():
    a = ScalePlan(unconditional_tokens=(scored(1, 4, 2, 3, share=0.5),), unconditional=(True,))
    b = ScalePlan(unconditional_tokens=(mask(0, 0, 1, 1),), unconditional=(True, False))
    left, right = a.meet(b), b.meet(a)
    assert left.unconditional == right.unconditional == (True, False)
    assert narrowed(left.unconditional_tokens, None, 1, 4).tolist() == [[False, False, False, True]]
    assert narrowed(right.unconditional_tokens, None, 1, 4).tolist() == [[False, False, False, True]]
    assert a.stops_branch
    assert not ScalePlan(selections=(mask(1, 0),)).stops_branch
    guided = [ScalePlan(guided_B=torch.tensor(values)) for values in ([True, True, False], [True, False, True])]
    met = guided[0].meet(guided[1]).meet(ScalePlan(unconditional=(True,)))
    assert met.guided_B.tolist() == [True, False, False]
    settled = met.with_branches([True, False, False])
    assert settled.unconditional == (True, False, False)
    assert settled.guided_B is None
    one_stopped = met.meet(ScalePlan(unconditional=(True, False, True)))
    assert one_stopped.with_branches([True, True, False]).unconditional == (True, False, False)


def test_dtypes_of_different_blocks_go_together():
    a = ScalePlan(dtypes=(BlockDtype(dtype=BF16, first=0, end=2),))
    b = ScalePlan(dtypes=(BlockDtype(dtype=FP16, first=2),))
    for met in (a.meet(b), b.meet(a)):
        assert [met.dtype_of(block) for block in range(4)] == [BF16, BF16, FP16, FP16]
    same = a.meet(ScalePlan(dtypes=(BlockDtype(dtype=BF16, first=1),)))
    assert [same.dtype_of(block) for block in range(3)] == [BF16] * 3
    assert [a.dtype_of(block) for block in range(3)] == [BF16, BF16, None]
    assert [BlockDtype(dtype=BF16, first=1, end=3).covers(block) for block in range(4)] == [False, True, True, False]


@settings(max_examples=60)
@given(firsts=st.tuples(*[st.integers(0, 4)] * 2), lengths=st.tuples(*[st.none() | st.integers(1, 4)] * 2))
def test_two_dtypes_conflict_exactly_where_a_block_has_both(firsts, lengths):
    a, b = (
        BlockDtype(dtype=dtype, first=first, end=None if length is None else first + length)
        for dtype, first, length in zip((BF16, FP16), firsts, lengths, strict=True)
    )
    plans = [ScalePlan(dtypes=(part,)) for part in (a, b)]
    if any(a.covers(block) and b.covers(block) for block in range(9)):
        with pytest.raises(PlanConflictError, match="two dtypes for one block, torch.bfloat16 and torch.float16"):
            plans[0].meet(plans[1])
    else:
        met = plans[0].meet(plans[1])
        for block in range(9):
            assert met.dtype_of(block) == (BF16 if a.covers(block) else FP16 if b.covers(block) else None)


def test_evicted_scales_are_united():
    met = ScalePlan(evict=(3, 1)).meet(ScalePlan(evict=(1, 0)))
    assert met.evict == (0, 1, 3)


def test_weights_of_bases_multiply_and_spread():
    one, each = torch.tensor([[0.5]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for a, b in ((one, each), (each, one)):
        met = ScalePlan(base_weight_Bl=a).meet(ScalePlan(base_weight_Bl=b))
        assert torch.equal(met.base_weight_Bl, 0.5 * each)
        assert met.weight_Bl is None
    whole = ScalePlan(base_weight_Bl=one, weight_Bl=each, guided_B=torch.tensor([True, False]))
    assert torch.equal(whole.meet(whole).base_weight_Bl, torch.tensor([[0.25]]))


BASES = [Base.PREVIOUS, Base.NEAREST, Base.COPY]


@pytest.mark.parametrize("a", BASES)
@pytest.mark.parametrize("b", BASES)
def test_only_two_different_bases_conflict(a: Base, b: Base):
    first, second = ScalePlan(base=a), ScalePlan(base=b)
    assert first.meet(ScalePlan()).base is ScalePlan().meet(first).base is a
    if a is b:
        assert first.meet(second).base is a
        return
    names = sorted((a.value, b.value))
    with pytest.raises(PlanConflictError, match=f"two base maps for dropped tokens, {names[0]} and {names[1]}; keep"):
        first.meet(second)


def test_two_sources_conflict():
    copy = ScalePlan(base=Base.COPY, source_Bl=torch.tensor([[0, 0]]))
    with pytest.raises(PlanConflictError, match="two maps of tokens to copy from; keep one"):
        copy.meet(copy)


def test_fills_conflict_only_between_plans_that_skip():
    part = (SublayerSelection(blocks=(0,), count=1, scorer=total),)
    sublayer = ScalePlan(sublayers=part, fill=CachedFill(unit=Unit.SUBLAYER, source=1, resize=Resize.AREA))
    depth = (DepthMap(depth_Bl=torch.tensor([[1, 1]]), order=(0, 1)),)
    cached, bare = ScalePlan(depths=depth, fill=CachedFill()), ScalePlan(depths=depth)
    with pytest.raises(
        PlanConflictError,
        match=r"two fills, the output of each sublayer at scale 1 \(area\) and the output of each block at the latest",
    ):
        sublayer.meet(cached)
    with pytest.raises(PlanConflictError, match="two fills, .* and nothing; keep one"):
        cached.meet(bare)
    assert sublayer.meet(ScalePlan(fill=CachedFill())).fill == sublayer.fill
    assert ScalePlan(fill=CachedFill()).meet(sublayer).fill == sublayer.fill
    assert len(cached.meet(cached).depths) == 2


def test_fewest_tokens_of_a_sublayer_count():
    parts = [SublayerSelection(blocks=blocks, count=n, scorer=total) for blocks, n in (((0, 1), 5), ((1, 2), 3))]
    met = ScalePlan(sublayers=(parts[0],)).meet(ScalePlan(sublayers=(parts[1],)))
    assert [met.sublayer_count(block, 8) for block in range(4)] == [5, 3, 3, 8]
    assert met.sublayer_count(0, 4) == 4


# Refused plans


CHECKER = PlanChecker(policy="ours", num_images=2, num_blocks=3, num_scales=5)
GOOD_DEPTH = torch.tensor([[0, 1, 2, 3]])
NAN = torch.tensor([[1.0, math.nan, 1.0, 1.0]])

WRONG: dict[str, tuple[ScalePlan, str, str]] = {
    "branches": (ScalePlan(unconditional=(True,) * 3), "unconditional", "one entry or 2"),
    "evict a coming scale": (ScalePlan(evict=(3,)), "evict", "scales from 0 to 2"),
    "evict before the first": (ScalePlan(evict=(-1,)), "evict", "scales from 0 to 2"),
    "copy without source": (ScalePlan(base=Base.COPY), "source_Bl", "given exactly with Base.COPY, got copy"),
    "source without copy": (ScalePlan(source_Bl=torch.zeros(1, 4).long()), "source_Bl", "given exactly with Base.COPY"),
    "source outside": (
        ScalePlan(base=Base.COPY, source_Bl=torch.tensor([[0, 1, 4, 0]])), "source_Bl", "indices of the 4 tokens"
    ),
    "source of the wrong length": (
        ScalePlan(base=Base.COPY, source_Bl=torch.zeros(1, 3).long()), "source_Bl", r"\(1 or 2, 4\), got \(1, 3\)"
    ),
    "fill from this scale": (ScalePlan(fill=CachedFill(source=2)), "fill.source", "a scale before 2"),
    "mask of the wrong length": (ScalePlan(selections=(mask(1, 0, 1, kept=2),)), "selections", r"\(1 or 2, 4\)"),
    "mask of too many images": (
        ScalePlan(selections=(MaskSelection(mask_Bl=torch.ones(3, 4).bool(), kept=4),)), "selections", r"got \(3, 4\)"
    ),
    "count that the mask does not keep": (
        ScalePlan(selections=(mask(1, 0, 1, 0, kept=3),)), "selections.kept", "what its mask keeps, got 3"
    ),
    "count that one image does not keep": (
        ScalePlan(selections=(MaskSelection(mask_Bl=torch.tensor([[True] * 4, [True] * 3 + [False]]), kept=4),)),
        "selections.kept", "what its mask keeps, got 4",
    ),
    "mask of nothing": (ScalePlan(selections=(mask(0, 0, 0, 0, kept=0),)), "selections.kept", "in 1 to 4, got 0"),
    "branch's count": (
        ScalePlan(unconditional_tokens=(mask(1, 0, 1, 0, kept=1),)), "unconditional_tokens.kept", "what its mask keeps"
    ),
    "branch's length": (
        ScalePlan(unconditional_tokens=(mask(1, 0, kept=1),)), "unconditional_tokens", r"\(1 or 2, 4\)"
    ),
    "share of nothing": (
        ScalePlan(selections=(scored(1, 2, 3, 4, share=0.0),)), "selections.share", r"in \(0, 1\], got 0.0"
    ),
    "share above one": (
        ScalePlan(unconditional_tokens=(scored(1, 2, 3, 4, share=1.5),)), "unconditional_tokens.share", "got 1.5"
    ),
    "score of NaN": (
        ScalePlan(selections=(TokenSelection(score_Bl=NAN, share=0.5, rule=Rule.MASS),)), "selections",
        "numbers, got NaN",
    ),
    "weight of NaN": (ScalePlan(weight_Bl=NAN), "weight_Bl", "numbers, got NaN"),
    "weight of the wrong length": (ScalePlan(weight_Bl=torch.ones(2, 3)), "weight_Bl", r"got \(2, 3\)"),
    "base weight of NaN": (ScalePlan(base_weight_Bl=NAN), "base_weight_Bl", "numbers, got NaN"),
    "base weight of too many images": (ScalePlan(base_weight_Bl=torch.ones(3, 1)), "base_weight_Bl", r"got \(3, 1\)"),
    "order without a block": (
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH, order=(0, 1)),)), "depths.order", "every block of 3 once"
    ),
    "order with a block twice": (
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH, order=(0, 1, 1)),)), "depths.order", "every block of 3 once"
    ),
    "depths of the wrong length": (
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH[:, :3], order=(0, 1, 2)),)), "depths.depth_Bl", r"got \(1, 3\)"
    ),
    "counts of two blocks": (
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH, order=(0, 1, 2), counts=(3, 2)),)), "depths.counts", "3 numbers"
    ),
    "counts that depths do not give": (
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH, order=(0, 1, 2), counts=(3, 2, 2)),)), "depths.counts",
        "what its depths give",
    ),
    "sublayer of no block": (
        ScalePlan(sublayers=(SublayerSelection(blocks=(3,), count=1, scorer=total),)), "sublayers.blocks", "blocks of 3"
    ),
    "sublayer of no token": (
        ScalePlan(sublayers=(SublayerSelection(blocks=(0,), count=0, scorer=total),)), "sublayers.count", "in 1 to 4"
    ),
    "sublayer of too many tokens": (
        ScalePlan(sublayers=(SublayerSelection(blocks=(0,), count=5, scorer=total),)), "sublayers.count", "in 1 to 4"
    ),
    "dtype of integers": (ScalePlan(dtypes=(BlockDtype(dtype=torch.int8),)), "dtypes", "of floats, got torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_plan_is_refused_by_policy_scale_and_field(name: str):
    plan, field, rule = WRONG[name]
    with pytest.raises(PlanConflictError, match=f"^ours: plan of scale 2: {field} must be .*{rule}"):
        CHECKER.check(plan, 2, 4)


@pytest.mark.parametrize(
    "plan",
    [
        ScalePlan(),
        ScalePlan(unconditional=(True, False), evict=(0, 1, 2)),
        ScalePlan(selections=(mask(1, 0, 1, 0, kept=2), mask(1, 0, 0, 0), scored(1, 2, 3, 4, share=1.0))),
        ScalePlan(unconditional_tokens=(MaskSelection(mask_Bl=torch.eye(4).bool()[:2], kept=1),)),
        ScalePlan(base=Base.COPY, source_Bl=torch.tensor([[3, 0, 0, 1]])),
        ScalePlan(weight_Bl=torch.ones(2, 1), base_weight_Bl=torch.ones(1, 4), fill=CachedFill(source=1)),
        ScalePlan(depths=(DepthMap(depth_Bl=GOOD_DEPTH, order=(2, 0, 1), counts=(3, 2, 1)),)),
        ScalePlan(sublayers=(SublayerSelection(blocks=(0, 2), count=4, scorer=total),)),
        ScalePlan(dtypes=(BlockDtype(dtype=BF16, first=2), BlockDtype(dtype=FP16, end=2))),
    ],
)
def test_right_plans_pass(plan: ScalePlan):
    CHECKER.check(plan, 2, 4)
