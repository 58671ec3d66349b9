"""What tokens dropped at random commit, against plain loops: the nearest code, the previous residual, a weight."""

import pytest
import torch
import torch.nn.functional as F

from foveate.core.errors import FoveateError
from foveate.core.plan import Base
from foveate.policies.random_tokens import RandomTokens
from foveate.policies.registry import load_policy
from tests.engine.naive import codes_of
from tests.toys import (
    SEEDS,
    Result,
    cached_run,
    checked,
    label_request,
    run,
    same_bits,
    toy,
    toy_var,
)


def nearest(kept: list[int], token: int, width: int) -> int:
    """The kept token with the smallest squared distance in grid steps; of equal ones that of the smallest index."""

    def distance(other: int) -> tuple[int, int]:
        dy, dx = other // width - token // width, other % width - token % width
        return dy * dy + dx * dx, other

    return min(kept, key=distance)


def replayed(result: Result, name: str, policy: RandomTokens) -> int:
    """Redoes every commit of a run from the codes that it drew; returns how many tokens copied another one's."""
    subject = toy(name)
    patch, lent = subject.schedule.patch, 0
    for image in range(len(SEEDS)):
        f_hat, residual = torch.zeros_like(result.f_hat[:1]), torch.zeros(8, 1, 1)
        for scale, (h, w) in enumerate(subject.schedule.grids):
            choice = result.choices[scale]
            kept = choice.positions(image, h * w)
            symbols = dict(zip(kept, choice.symbols[image], strict=True))
            sources = [nearest(kept, token, w) for token in range(h * w)]
            codes = codes_of(torch.stack([symbols[source] for source in sources]), (h, w), patch)
            base = torch.zeros_like(codes)
            if policy.fill == "nearest":
                base = codes
                lent += sum(source != token for token, source in enumerate(sources))
            elif policy.fill == "base":
                base = F.interpolate(residual[None], size=codes.shape[-2:], mode="nearest")[0]
            fresh = torch.empty_like(codes)
            for y in range(h * patch):
                for x in range(w * patch):
                    is_kept = y // patch * w + x // patch in symbols
                    fresh[:, y, x] = codes[:, y, x] if is_kept else policy.base_weight * base[:, y, x]
            residual = fresh
            f_hat = f_hat + F.interpolate(residual[None], size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
            assert torch.allclose(result.f_hats[scale][image], f_hat[0], atol=1e-5)
    return lent


@pytest.mark.in_turn("policy", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize(
    "policy",
    [
        RandomTokens(fill="nearest", keep_ratio=0.3),
        RandomTokens(fill="nearest", base_weight=0.5, num_scales=2),
        RandomTokens(fill="nearest", base_weight=1.5, num_scales=1, keep_ratio=0.05),
    ],
    ids=lambda policy: policy.spec,
)
def test_dropped_tokens_commit_the_code_of_the_nearest_that_ran(policy: RandomTokens, name: str):
    result = run(toy(name), policy)
    assert replayed(result, name, policy) > 0
    assert {plan.base for plan in result.bound.plans[5 - policy.num_scales :]} == {Base.NEAREST}


@pytest.mark.parametrize("name", ["odd", "patches"])
def test_base_weight_multiplies_the_previous_residual(name: str):
    policy = RandomTokens(base_weight=0.25)
    result = run(toy(name), policy)
    replayed(result, name, policy)
    assert not torch.equal(result.f_hats[3], cached_run("random-tokens", name).f_hats[3])


def test_zero_weight_of_a_base_is_the_zero_fill():
    zero = cached_run("random-tokens:fill=zero", "odd")
    for fill in ("base", "nearest"):
        assert same_bits(run(toy("odd"), RandomTokens(fill=fill, base_weight=0.0)), zero)
    assert same_bits(run(toy("odd"), RandomTokens(fill="zero", base_weight=3.0)), zero)


@pytest.mark.parametrize("fill", ["base", "zero"])
def test_weight_of_one_says_nothing(fill: str):
    """The plans and bits of the settings without these fields."""
    result = run(toy("square"), RandomTokens(fill=fill))
    assert all(plan.base_weight_Bl is None for plan in result.bound.plans)
    assert same_bits(result, cached_run(f"random-tokens:fill={fill}", "square"))
    weighted = run(toy("square"), RandomTokens(fill=fill, base_weight=0.5)).bound.plans
    assert [None if p.base_weight_Bl is None else p.base_weight_Bl.tolist() for p in weighted] == [None] * 2 + [
        [[0.5]]
    ] * 3
    assert [plan.base for plan in weighted[2:]] == [Base.PREVIOUS if fill == "base" else Base.ZERO] * 3


def test_copied_codes_are_weighted_by_the_base_and_not_by_the_source():
    """In a composition the weight of a code is that of the token that ran; what it lends is its code itself."""
    result = run(toy("square"), load_policy("random-tokens:fill=nearest,base_weight=0.5,num_scales=1|depthvar"))
    step, weight_Bl = (result.f_hats[4] - result.f_hats[3]).flatten(2), result.bound.plans[4].weight_Bl
    for image in range(3):
        kept = result.choices[4].kept[image].tolist()
        dropped = [token for token in range(64) if token not in kept]
        expected = weight_Bl[image, kept] * 8**-0.5
        assert torch.allclose(step[image][:, kept].abs(), expected.expand(8, -1), atol=1e-5)
        assert torch.allclose(step[image][:, dropped].abs(), torch.full((8, len(dropped)), 0.5 * 8**-0.5), atol=1e-5)


def test_every_image_copies_its_own_codes_also_of_a_codebook():
    subject = toy_var()
    batch = run(subject, RandomTokens(fill="nearest"), label_request(subject.schedule))
    alone = run(subject, RandomTokens(fill="nearest"), label_request(subject.schedule, SEEDS[2:], (2,)))
    assert torch.allclose(batch.f_hat[2], alone.f_hat[0], atol=1e-5)
    for scale in (2, 3, 4):
        ids = batch.choices[scale].symbols[1][:, 0]
        grid, kept = subject.schedule.grids[scale], batch.choices[scale].kept[1].tolist()
        sources = [kept.index(nearest(kept, token, grid[1])) for token in range(grid[0] * grid[1])]
        added = subject.tokenizer.residual(ids[sources][None, :, None], grid)
        before = batch.f_hats[scale - 1][1:2]
        assert torch.allclose(subject.tokenizer.add(before, added, scale, 5)[0], batch.f_hats[scale][1], atol=1e-5)


def test_tokens_that_another_part_drops_take_the_nearest_too():
    """The nearest one of those that ran in the end, by the mask as all parts met it."""
    pair = load_policy("random-tokens:fill=nearest,num_scales=1|ld-pruning:sats=false,fill=zero,lhep_scales=1")
    result = run(toy("wide"), pair)
    replayed(result, "wide", RandomTokens(fill="nearest"))
    assert max(len(part) for part in result.choices[4].kept) < 25


@pytest.mark.parametrize(
    ("field", "value"),
    [("fill", "mean"), ("base_weight", -0.5), ("base_weight", float("inf")), ("base_weight", float("nan"))],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be .*, got {value}"):
        checked(RandomTokens(), field, value)
