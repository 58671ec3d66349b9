"""FeatureMagnitude against the twin that follows each image: which tokens run, what the others commit, the cost."""

import math

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.plan import Base
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import SublayerInput
from foveate.policies.feature_magnitude import FeatureMagnitude
from foveate.policies.registry import load_policy
from tests.policies.following import Seen, assert_forecast_holds, replayed_by_score
from tests.toys import LENGTHS, SEEDS, cached_run, checked, make_request, run, same_bits, toy

SETTINGS = (
    ("feature-magnitude", -1, 0.5, 3, Base.PREVIOUS),
    ("feature-magnitude:keep_ratio=0.3,num_scales=2,fill=zero,block=1", 1, 0.3, 2, Base.ZERO),
)


def norms(seen: Seen, block: int) -> list[float]:
    """Zero where a token did not run, as its hidden state is."""
    return [math.sqrt(sum(x * x for x in row)) for row in seen.inputs[block].tolist()]


@pytest.mark.in_turn("spec", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize(("spec", "block", "share", "num_scales", "base"), SETTINGS)
def test_longest_hidden_states_are_kept(spec: str, block: int, share: float, num_scales: int, base: Base, name: str):
    pages = replayed_by_score(spec, name, lambda seen: norms(seen, block), share, num_scales, base)
    signals = cached_run(spec, name).bound.signals
    recorded = SublayerInput(block=block % 5)
    for image, seen in enumerate(pages):
        for scale in range(5 - num_scales, 5):
            hidden_lC = signals[scale][recorded][image]
            assert torch.allclose(hidden_lC, seen[scale - 1].inputs[block], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["square", "patches"])
@pytest.mark.parametrize("spec", [spec for spec, *_ in SETTINGS])
def test_cost_is_known_before(spec: str, name: str):
    assert_forecast_holds(cached_run(spec, name), name, is_static=True)


def test_the_signal_is_recorded_only_where_a_later_scale_reads_it():
    schedule, shape = ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape
    bound = load_policy("feature-magnitude:block=-2").bind(schedule, shape)
    assert [s for s in range(13) if bound.record(s)] == [9, 10, 11]
    assert bound.record(9) == {SublayerInput(block=3)}
    assert bound.label == "feature-magnitude"


@pytest.mark.parametrize("count", [2, 4])
def test_another_part_may_leave_out_the_scales_that_are_read(count: int):
    """They are the last ones, so nothing is left to decide."""
    result = cached_run(f"feature-magnitude:num_scales=1|skip-scales:count={count}", "square")
    assert same_bits(result, cached_run(f"skip-scales:count={count}", "square"))


@pytest.mark.parametrize("policy", [FeatureMagnitude.neutral(), FeatureMagnitude(num_scales=0)])
def test_switched_off_is_full(policy: FeatureMagnitude):
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
        checked(FeatureMagnitude(), field, value)


@pytest.mark.parametrize("block", [5, -6])
def test_block_must_be_one_of_the_model(block: int):
    with pytest.raises(FoveateError, match=rf"block must be in \[-5, 4\] of this model, got {block}"):
        FeatureMagnitude(block=block).bind(toy("square").schedule, toy("square").model.shape)


def test_signals_of_a_block_that_no_token_ran_are_zero():
    """DepthVAR may leave the last block, whose input the other policy scores by, without a token of a single image."""
    record = SublayerInput(block=4, sublayer=0)
    result = run(
        toy("wide"),
        load_policy("feature-magnitude|depthvar"),
        make_request(toy("wide").schedule, SEEDS[:1], LENGTHS[:1]),
    )
    blocks = [scale.work.rows[(0, True)].block_tokens for scale in result.trace.scales]
    assert blocks[3][4] == 0 < blocks[2][4]
    seen = {signals.scale: signals[record] for signals in result.bound.signals if signals and record in signals.values}
    assert not seen[3].any()
    assert seen[2].any()
