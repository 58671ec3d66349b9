"""Plans: how many tokens a score keeps, and the lattice that makes plans compose."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import Base, CachedFill, DepthMap, ScalePlan
from foveate.core.policy import require
from foveate.core.selection import Rule, TokenSelection, keep_by_count, keep_by_mass
from tests.randomness import generator

SHARES = st.sampled_from([0.05, 0.25, 0.4, 0.5, 0.55, 0.75, 0.9, 0.999])


def scores(min_size: int = 1, max_value: int = 40):
    """Scores in eighths, so that sums are exact and ties are common."""
    return st.lists(st.integers(0, max_value).map(lambda i: i / 8), min_size=min_size, max_size=30)


def mass_kept(values: list[float], share: float) -> list[bool]:
    """The fewest of the sorted scores that reach the share, then everything that ties with the last."""
    total, held = sum(map(Fraction, values)), Fraction(0)
    if share >= 1 or total == 0:
        return [True] * len(values)
    for value in sorted(values, reverse=True):
        held += Fraction(value)
        if held >= share * float(total):
            return [v >= value for v in values]
    raise AssertionError("a share below one is always reached")


@settings(deadline=None, max_examples=80)
@given(values=scores(), share=SHARES)
def test_mass_equals_the_definition(values: list[float], share: float):
    assert keep_by_mass(torch.tensor([values]), share)[0].tolist() == mass_kept(values, share)


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True), share=SHARES)
def test_mass_never_keeps_more_than_the_share_without_ties(values: list[int], share: float):
    kept = int(keep_by_mass(torch.tensor([values]).double(), share).sum())
    assert 1 <= kept <= math.ceil(share * len(values))


def test_ties_may_keep_more():
    assert keep_by_mass(torch.ones(1, 8), 0.25).all()
    assert keep_by_mass(torch.tensor([[4.0, 1.0, 1.0, 1.0]]), 0.6).all()


def test_mass_reaches_the_share_exactly_without_one_too_many():
    """Tenths do not add up exactly in floating point; a token more would be the sign of it."""
    values = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    assert keep_by_mass(values, 0.7)[0].tolist() == [True, True, False, False]
    assert keep_by_mass(torch.tensor([[0.3, 0.2, 0.1, 0.6]]).double(), 0.5)[0].tolist() == [False, False, False, True]


def test_mass_keeps_all_of_nothing_and_of_everything():
    values = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
    assert keep_by_mass(values, 0.5).tolist() == [[True] * 3, [True, False, False]]
    assert keep_by_mass(values, 1.0).all()


def test_mass_decides_for_each_image():
    values = torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.1, 1.2, 1.3]])
    assert keep_by_mass(values, 0.5).sum(-1).tolist() == [1, 2]


@settings(deadline=None, max_examples=40)
@given(values=scores(max_value=6), data=st.data())
def test_count_equals_the_definition(values: list[float], data: st.DataObject):
    count = data.draw(st.integers(0, len(values)))
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert keep_by_count(torch.tensor([values]), count)[0].nonzero().flatten().tolist() == sorted(best)


@settings(deadline=None, max_examples=40)
@given(values=scores(min_size=4), data=st.data(), shares=st.tuples(SHARES, SHARES))
def test_selections_rank_the_survivors_from_left_to_right(
    values: list[float], data: st.DataObject, shares: tuple[float, float]
):
    second = [float(i) for i in data.draw(st.permutations(range(len(values))))]
    count_first = ScalePlan(
        selections=(
            TokenSelection(score_Bl=torch.tensor([second]), share=shares[0], rule=Rule.COUNT),
            TokenSelection(score_Bl=torch.tensor([values]), share=shares[1], rule=Rule.MASS),
        )
    )
    best = sorted(range(len(values)), key=lambda i: -second[i])[: math.ceil(shares[0] * len(values))]
    kept = dict(zip(best, mass_kept([values[i] for i in best], shares[1]), strict=True))
    expected = [bool(kept.get(i)) for i in range(len(values))]
    assert count_first.keep(1, len(values))[0].tolist() == expected
    assert count_first.keep(2, len(values)).tolist() == [expected, expected]


# The lattice


def some_plan(seed: int, depth: bool = True) -> ScalePlan:
    source = generator(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(2, 6, generator=source)

    draws = uniform()[0].tolist()
    depths = (DepthMap(depth_Bl=(uniform() * 4).long(), order=(0, 2, 1)),) if depth and draws[0] < 0.7 else ()
    return ScalePlan(
        runs=draws[1] < 0.8,
        unconditional=None if draws[2] < 0.3 else (draws[3] < 0.5, draws[4] < 0.5),
        selections=(TokenSelection(score_Bl=uniform(), share=0.6, rule=Rule.MASS),) if draws[5] < 0.5 else (),
        depths=depths,
        fill=CachedFill(),
        weight_Bl=uniform(),
    )


def meaning(plan: ScalePlan) -> tuple:
    """What a plan lets run, order of selections aside."""
    active = [plan.active(block) for block in range(3)]
    branch = plan.unconditional or (True, True)
    weight = torch.ones(2, 6) if plan.weight_Bl is None else plan.weight_Bl
    return (
        plan.runs,
        branch if len(branch) > 1 else branch * 2,
        [None if a is None else a.tolist() for a in active],
        weight,
        plan.base,
    )


def same(a: ScalePlan, b: ScalePlan) -> bool:
    first, second = meaning(a), meaning(b)
    return first[:3] == second[:3] and torch.allclose(first[3], second[3]) and first[4] == second[4]


@pytest.mark.parametrize("seed", range(8))
def test_meeting_is_commutative_associative_and_has_a_neutral_element(seed: int):
    a, b, c = (some_plan(3 * seed + i) for i in range(3))
    assert same(a.meet(b), b.meet(a))
    assert same(a.meet(b).meet(c), a.meet(b.meet(c)))
    for met in (a.meet(ScalePlan()), ScalePlan().meet(a)):
        assert same(met, a)
        assert met.selections == a.selections
        assert met.fill == a.fill or not a.depths


def test_meeting_lets_run_what_both_let_run():
    a = ScalePlan(
        runs=True,
        unconditional=(True, False),
        depths=(DepthMap(depth_Bl=torch.tensor([[1, 2, 3]]), order=(2, 0, 1)),),
        weight_Bl=torch.tensor([[1.0, 0.5, 0.5]]),
        base=Base.PREVIOUS,
    )
    b = ScalePlan(
        unconditional=(True,),
        depths=(DepthMap(depth_Bl=torch.tensor([[3, 1, 2]]), order=(2, 0, 1)),),
        weight_Bl=torch.tensor([[0.5, 0.5, 1.0]]),
    )
    met = a.meet(b)
    assert met.unconditional == (True, False)
    assert [met.active(block).int().tolist() for block in (2, 0, 1)] == [[[1, 1, 1]], [[0, 0, 1]], [[0, 0, 0]]]
    assert met.weight_Bl.tolist() == [[0.5, 0.25, 0.5]]
    assert met.base is Base.PREVIOUS
    assert b.meet(ScalePlan(unconditional=(False,))).unconditional == (False,)
    assert not a.meet(ScalePlan(runs=False)).runs


def test_only_fills_of_two_depths_conflict():
    depth = (DepthMap(depth_Bl=torch.ones(1, 3).long(), order=(0, 1)),)
    cached, identity = ScalePlan(depths=depth, fill=CachedFill()), ScalePlan(depths=depth)
    with pytest.raises(PlanConflictError, match="two fills, the output of each block at the latest scale .* nothing"):
        cached.meet(identity)
    assert cached.meet(ScalePlan()).fill == CachedFill()
    assert ScalePlan().meet(cached).fill == CachedFill()
    assert len(cached.meet(cached).depths) == 2


def test_zero_base_gives_way_and_equal_bases_agree():
    previous, zero = ScalePlan(base=Base.PREVIOUS), ScalePlan(base=Base.ZERO)
    assert previous.meet(previous).base is Base.PREVIOUS
    assert previous.meet(zero).base is zero.meet(previous).base is Base.PREVIOUS


def test_depth_runs_the_first_blocks_of_its_order():
    depth = DepthMap(depth_Bl=torch.tensor([[0, 1, 3]]), order=(1, 2, 0))
    assert [depth.active(block).tolist() for block in range(3)] == [
        [[False, False, True]],
        [[False, True, True]],
        [[False, False, True]],
    ]


def test_checks_say_what_came():
    with pytest.raises(FoveateError, match=r"keep_ratio must be in \(0, 1\], got 1.5"):
        require(False, "keep_ratio", "in (0, 1]", 1.5)
    require(True, "keep_ratio", "in (0, 1]", 0.5)
