"""TokenVariance against the twin that follows each image: which tokens run, what the others commit, the cost."""

import math

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.plan import Base
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import SublayerInput
from foveate.policies.registry import load_policy
from foveate.policies.token_variance import TokenVariance, distances_to_mean
from tests.policies.following import Seen, assert_forecast_holds, replayed_by_score
from tests.toys import cached_run, checked, run, same_bits, toy

SETTINGS = (
    ("token-variance", -1, 0.5, 3, Base.PREVIOUS),
    ("token-variance:keep_ratio=0.3,num_scales=2,fill=zero,block=1", 1, 0.3, 2, Base.ZERO),
)


def distances(seen: Seen, block: int) -> list[float]:
    """To the mean over the tokens that ran; the others are not far from anything."""
    rows = seen.inputs[block].double().tolist()
    mean = [sum(rows[token][c] for token in seen.kept) / len(seen.kept) for c in range(len(rows[0]))]
    return [
        sum((x - m) ** 2 for x, m in zip(row, mean, strict=True)) if token in seen.kept else 0.0
        for token, row in enumerate(rows)
    ]


@pytest.mark.in_turn("spec", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize(("spec", "block", "share", "num_scales", "base"), SETTINGS)
def test_tokens_far_from_the_mean_are_kept(spec: str, block: int, share: float, num_scales: int, base: Base, name: str):
    replayed_by_score(spec, name, lambda seen: distances(seen, block), share, num_scales, base)


def test_tokens_that_did_not_run_do_not_move_the_mean():
    hidden = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((hidden, torch.zeros(2, 3, 4)), dim=1)
    assert torch.allclose(distances_to_mean(padded)[:, :6], distances_to_mean(hidden), atol=1e-5)
    assert not distances_to_mean(padded)[:, 6:].any()
    assert not distances_to_mean(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize("name", ["square", "patches"])
@pytest.mark.parametrize("spec", [spec for spec, *_ in SETTINGS])
def test_cost_is_known_before(spec: str, name: str):
    assert_forecast_holds(cached_run(spec, name), name, is_static=True)


def test_the_signal_is_recorded_only_where_a_later_scale_reads_it():
    schedule, shape = ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape
    bound = load_policy("token-variance:num_scales=2").bind(schedule, shape)
    assert [s for s in range(13) if bound.record(s)] == [10, 11]
    assert bound.record(10) == {SublayerInput(block=4)}
    assert bound.label == "token-variance"


@pytest.mark.parametrize("count", [2, 4])
def test_another_part_may_leave_out_the_scales_that_are_read(count: int):
    """They are the last ones, so nothing is left to decide."""
    result = cached_run(f"token-variance:num_scales=1|skip-scales:count={count}", "square")
    assert same_bits(result, cached_run(f"skip-scales:count={count}", "square"))


@pytest.mark.parametrize("policy", [TokenVariance.neutral(), TokenVariance(num_scales=0)])
def test_switched_off_is_full(policy: TokenVariance):
    result = run(toy("odd"), policy)
    assert same_bits(result, cached_run("full", "odd"))
    assert result.bound.directives == ()
    assert not any(result.bound.record(scale) for scale in range(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep_ratio", 0.0), ("keep_ratio", 1.1), ("keep_ratio", math.nan), ("num_scales", -1), ("fill", "none")],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be .* got {value}"):
        checked(TokenVariance(), field, value)


def test_block_must_be_one_of_the_model():
    with pytest.raises(FoveateError, match=r"block must be in \[-5, 4\] of this model, got 5"):
        TokenVariance(block=5).bind(toy("square").schedule, toy("square").model.shape)
