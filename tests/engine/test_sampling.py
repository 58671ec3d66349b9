"""Samplers and filters against definitions written out value by value."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.engine.sample import (
    Filter,
    ForcedSampler,
    KeyedSampler,
    ReferenceSampler,
    SmoothSampler,
    keyed_exponential,
    keyed_uniform,
    probabilities,
)
from foveate.policies.full import Full
from tests.engine.naive import draw, filtered
from tests.randomness import normal
from tests.toys import make_request, run, same_bits, toy

OFF = Filter(top_k=0, top_p=0.0)


def some_logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * normal(*shape, stream=seed)


# Keyed draws


@pytest.mark.parametrize(("seed", "scale", "stream"), [(0, 0, 0), (7, 12, 0), (2**63 + 5, 3, 1)])
def test_keyed_uniform_is_the_formula_of_the_contract(seed: int, scale: int, stream: int):
    shape = (3, 5, 4)
    u = keyed_uniform(seed, scale, shape, stream)
    raw = np.random.Philox(key=np.array([seed, 256 * scale + stream], dtype=np.uint64)).random_raw(60)
    expected = [(Fraction(int(r) // 2**41) + Fraction(1, 2)) / 2**23 for r in raw]
    assert u.shape == shape
    assert [Fraction(float(x)) for x in u.ravel()] == expected
    assert [Fraction(float(x)) for x in u.astype(np.float32).ravel()] == expected
    assert u.min() > 0
    assert u.max() < 1


def test_keyed_uniform_of_known_seeds():
    """Written down once: these numbers must never change, or every seed draws another image."""
    u = keyed_uniform(42, 3, (4,))
    assert [int(x * 2**24) for x in u] == PINNED


PINNED = [490477, 5547057, 6893975, 2479491]


def test_keyed_uniform_differs_by_seed_scale_and_stream():
    draws = {keyed_uniform(s, k, (1,), t).item() for s in (0, 1) for k in (0, 1) for t in (0, 1)}
    assert len(draws) == 8


def test_keyed_uniform_of_a_larger_map_begins_with_the_smaller_one():
    assert np.array_equal(keyed_uniform(1, 2, (4, 4, 8)).ravel()[:64], keyed_uniform(1, 2, (2, 4, 8)).ravel())


@pytest.mark.parametrize("kept", [None, [0, 3, 4, 11]])
def test_keyed_bits_are_draws_below_the_probability(kept: list[int] | None):
    positions = list(range(12)) if kept is None else kept
    logits = [some_logits(i, len(positions), 8, 2) for i in range(2)]
    index = None if kept is None else [torch.tensor(kept)] * 2
    chosen = KeyedSampler(seeds=(5, 6)).choose(4, (3, 4), logits, index, OFF)
    for image, seed in enumerate((5, 6)):
        u = draw(seed, 4, 12 * 8)
        for i, position in enumerate(positions):
            for bit in range(8):
                p1 = 1 / (1 + math.exp(float(logits[image][i, bit, 0] - logits[image][i, bit, 1])))
                assert int(chosen[image][i, bit]) == int(u[position * 8 + bit] < p1)


def test_keyed_ids_are_the_largest_share_over_exponential():
    logits = some_logits(1, 3, 1, 16)
    kept = [torch.tensor([1, 2, 5])]
    (chosen,) = KeyedSampler(seeds=(9,)).choose(2, (2, 3), [logits], kept, OFF)
    u = draw(9, 2, 6 * 16)
    for i, position in enumerate([1, 2, 5]):
        p = filtered(logits[i, 0].tolist(), 0, 0.0)
        race = [p[v] / -math.log(u[position * 16 + v]) for v in range(16)]
        assert int(chosen[i, 0]) == race.index(max(race))


def test_keyed_ids_follow_the_distribution():
    logits = some_logits(2, 1, 1, 4).expand(4096, 1, 4)
    (chosen,) = KeyedSampler(seeds=(1,)).choose(0, (64, 64), [logits], None, OFF)
    shares = torch.bincount(chosen.flatten(), minlength=4) / 4096
    assert torch.allclose(shares, logits[0, 0].softmax(-1), atol=0.03)


def test_keyed_bits_follow_the_distribution():
    logits = some_logits(3, 1, 1, 2).expand(4096, 1, 2)
    (chosen,) = KeyedSampler(seeds=(1,)).choose(0, (64, 64), [logits], None, OFF)
    assert abs(float(chosen.float().mean()) - float(logits[0, 0].softmax(-1)[1])) < 0.03


@pytest.mark.parametrize("num_values", [2, 16])
def test_top_1_is_greedy(num_values: int):
    logits = some_logits(4, 6, 3, num_values)
    (chosen,) = KeyedSampler(seeds=(0,)).choose(1, (2, 3), [logits], None, Filter(top_k=1, top_p=0.0))
    assert torch.equal(chosen, logits.argmax(-1))


# Filters


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    num_values=st.sampled_from([2, 3, 7, 16]),
    top_k=st.integers(0, 18),
    top_p=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.8, 0.97, 1.0]),
)
def test_filters_equal_the_definition(seed: int, num_values: int, top_k: int, top_p: float):
    logits = some_logits(seed, 5, 2, num_values)
    ours = probabilities(logits, top_k, top_p)
    for i in range(5):
        for d in range(2):
            expected = torch.tensor(filtered(logits[i, d].tolist(), top_k, top_p), dtype=torch.float32)
            assert torch.equal(ours[i, d] > 0, expected > 0)
            assert torch.allclose(ours[i, d], expected, atol=1e-5)


def test_ties_with_the_kth_stay():
    p = probabilities(torch.tensor([[[1.0, 2.0, 2.0, 0.0]]]), 1, 0.0)
    assert p[0, 0].tolist() == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("gap", [0.1, 1.0, 3.0, 4.0])
def test_two_values_in_closed_form(gap: float):
    """With two values top-p drops the smaller share if it is at most 1 - p, and nothing else."""
    p = probabilities(torch.tensor([[[0.0, gap], [gap, 0.0]]]), 0, 0.97)[0]
    low = 1 / (1 + math.exp(gap))
    low = 0.0 if low <= 0.03 else low
    assert torch.allclose(p, torch.tensor([[low, 1 - low], [1 - low, low]]))


# The published order of draws


@pytest.mark.parametrize("num_values", [2, 16])
@pytest.mark.parametrize("rule", [OFF, Filter(top_k=900, top_p=0.97), Filter(top_k=1, top_p=0.0)])
def test_reference_draws_are_those_of_multinomial(num_values: int, rule: Filter):
    logits = [some_logits(i, 6, 4, num_values) for i in range(2)]
    sampler = ReferenceSampler(generator=torch.Generator().manual_seed(3))
    theirs = torch.Generator().manual_seed(3)
    for scale in range(2):
        chosen = sampler.choose(scale, (2, 3), logits, None, rule)
        p = torch.cat([probabilities(x, rule.top_k, rule.top_p) for x in logits]).view(-1, num_values)
        expected = torch.multinomial(p, num_samples=1, generator=theirs).view(2, 6, 4)
        assert torch.equal(torch.stack(chosen), expected)


def test_reference_draws_do_not_depend_on_what_was_dropped():
    logits = [some_logits(i, 6, 4, 2) for i in range(2)]
    kept = [torch.tensor([0, 5]), torch.tensor([1, 2, 3])]
    few = [x[index] for x, index in zip(logits, kept, strict=True)]
    a, b = (ReferenceSampler(generator=torch.Generator().manual_seed(8)) for _ in range(2))
    for scale in range(2):
        whole = a.choose(scale, (2, 3), logits, None, OFF)
        part = b.choose(scale, (2, 3), few, kept, OFF)
        assert all(torch.equal(w[i], p) for w, i, p in zip(whole, kept, part, strict=True))


def test_reference_run_reproduces_from_its_seed():
    subject = toy("square")

    def drawn(seed: int):
        sampler = ReferenceSampler(generator=torch.Generator().manual_seed(seed))
        return run(subject, Full(), make_request(subject.schedule, sampler=sampler))

    assert same_bits(drawn(1), drawn(1))
    assert not same_bits(drawn(1), drawn(2))


# Forced codes


def test_forced_codes_are_committed():
    subject = toy("wide")
    drawn = run(subject, Full())
    symbols = tuple(torch.stack(drawn.choices[scale].symbols) for scale in range(5))
    forced = run(
        subject, Full(), make_request(subject.schedule, seeds=(8, 8, 8), sampler=ForcedSampler(symbols=symbols))
    )
    assert same_bits(drawn, forced)
    flipped = (*symbols[:4], 1 - symbols[4])
    other = run(subject, Full(), make_request(subject.schedule, sampler=ForcedSampler(symbols=flipped)))
    assert torch.equal(other.f_hats[3], drawn.f_hats[3])
    step = drawn.f_hats[4] - drawn.f_hats[3]
    assert torch.allclose(other.f_hats[4] - other.f_hats[3], -step, atol=1e-6)


def test_forced_codes_take_the_kept_positions():
    symbols = torch.arange(6)[None, :, None].expand(2, -1, 3)
    kept = [torch.tensor([1, 4]), torch.tensor([0])]
    logits = [torch.zeros(2, 3, 2), torch.zeros(1, 3, 2)]
    first, second = ForcedSampler(symbols=(symbols,)).choose(0, (2, 3), logits, kept, OFF)
    assert first.tolist() == [[1, 1, 1], [4, 4, 4]]
    assert second.tolist() == [[0, 0, 0]]


# Mixed codes and what was drawn before them


def mixing(inner: KeyedSampler | ReferenceSampler, **changes: object) -> SmoothSampler:
    settings = {"num_scales": 5, "first": 0, "end": 5, "is_after_draw": True, "holds_last": True} | changes
    return SmoothSampler(inner=inner, **settings)


def test_the_last_scale_may_be_mixed_like_the_one_before():
    logits, rule = [some_logits(1, 4, 1, 9)], Filter(top_k=5, top_p=0.0)
    held, plain = (mixing(KeyedSampler(seeds=(3,)), holds_last=flag) for flag in (True, False))
    for scale in range(5):
        is_equal = torch.equal(*(s.choose(scale, (2, 2), logits, None, rule)[0] for s in (held, plain)))
        assert is_equal == (scale < 4)
    e = torch.from_numpy(keyed_exponential(3, 4, (4, 9), 1))
    kept = logits[0][:, 0].masked_fill(logits[0][:, 0] < logits[0][:, 0].topk(5).values[:, -1:], -torch.inf)
    expected = ((kept * 1.75 - e.log()) / (0.27 * (1 - 0.95 * 0.75))).softmax(-1)
    assert torch.allclose(held.choose(4, (2, 2), logits, None, rule)[0], expected, atol=1e-6)


@pytest.mark.parametrize("is_keyed", [True, False])
def test_mixed_codes_come_with_the_ids_drawn_before_them(is_keyed: bool):
    logits, kept, rule = [some_logits(1, 3, 1, 9)], [torch.tensor([0, 2, 3])], Filter(top_k=5, top_p=0.0)

    def inner() -> KeyedSampler | ReferenceSampler:
        return KeyedSampler(seeds=(3,)) if is_keyed else ReferenceSampler(generator=torch.Generator().manual_seed(3))

    weights, drawn = mixing(inner()).choose_with_draws(2, (2, 2), logits, kept, rule)
    assert torch.equal(drawn[0], inner().choose(2, (2, 2), logits, kept, rule)[0])
    assert torch.equal(weights[0], mixing(inner()).choose(2, (2, 2), logits, kept, rule)[0])
    assert weights[0].shape == (3, 9)
    symbols, same = mixing(inner(), first=3).choose_with_draws(2, (2, 2), logits, kept, rule)
    assert symbols is same
    assert torch.equal(same[0], drawn[0])
    assert (mixing(inner()).generator_of() is None) == is_keyed
