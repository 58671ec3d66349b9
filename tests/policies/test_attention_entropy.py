"""AttentionEntropy against softmax weights in float64: the signal, which tokens are kept, what it costs."""

import math

import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.plan import Base
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import AttentionEntropy
from foveate.policies.attention_entropy import AttentionEntropyTokens
from foveate.policies.registry import load_policy
from tests.policies.following import Seen, assert_forecast_holds, replayed_by_score
from tests.toys import cached_run, checked, run, same_bits, toy

SETTINGS = (
    ("attention-entropy", -1, "high", 0.5, 3, Base.PREVIOUS),
    ("attention-entropy:polarity=low", -1, "low", 0.5, 3, Base.PREVIOUS),
    ("attention-entropy:polarity=low,keep_ratio=0.3,num_scales=2,fill=zero,block=1", 1, "low", 0.3, 2, Base.ZERO),
)


def scores(seen: Seen, block: int, polarity: str) -> list[float]:
    """Whichever end is kept, a token that did not run comes last."""
    entropies = seen.entropies[block].tolist()
    highest = max(entropies)
    if polarity == "high":
        return [entropies[token] if token in seen.kept else 0.0 for token in range(len(entropies))]
    return [highest - entropies[token] if token in seen.kept else 0.0 for token in range(len(entropies))]


@pytest.mark.in_turn("spec", "name")
@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
@pytest.mark.parametrize(("spec", "block", "polarity", "share", "num_scales", "base"), SETTINGS)
def test_tokens_are_kept_by_the_entropy_of_their_attention(
    spec: str, block: int, polarity: str, share: float, num_scales: int, base: Base, name: str
):
    pages = replayed_by_score(spec, name, lambda seen: scores(seen, block, polarity), share, num_scales, base)
    signals = cached_run(spec, name).bound.signals
    recorded = AttentionEntropy(block=block % 5)
    for image, seen in enumerate(pages):
        for scale in range(5 - num_scales, 5):
            entropy_l = signals[scale][recorded][image]
            assert torch.allclose(entropy_l.double(), seen[scale - 1].entropies[block], atol=1e-4)
            assert (entropy_l > 0).sum() == len(seen[scale - 1].kept)


def test_both_ends_are_different_tokens():
    """At the first pruned scale both rank the same entropies, in full."""
    kept = [cached_run(spec, "square").choices[2].kept for spec, *_ in SETTINGS[:2]]
    for image in range(3):
        high, low = (set(part[image].tolist()) for part in kept)
        assert len(high) == len(low) == 8
        assert len(high & low) <= 1


@pytest.mark.parametrize("name", ["square", "patches"])
@pytest.mark.parametrize("spec", [spec for spec, *_ in SETTINGS])
def test_cost_is_known_before(spec: str, name: str):
    assert_forecast_holds(cached_run(spec, name), name, is_static=True)


def test_the_signal_is_recorded_only_where_a_later_scale_reads_it():
    schedule, shape = ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape
    bound = load_policy("attention-entropy:block=0").bind(schedule, shape)
    assert [s for s in range(13) if bound.record(s)] == [9, 10, 11]
    assert bound.record(9) == {AttentionEntropy(block=0)}
    assert bound.label == "attention-entropy"


@pytest.mark.parametrize("count", [2, 4])
def test_another_part_may_leave_out_the_scales_that_are_read(count: int):
    """They are the last ones, so nothing is left to decide."""
    result = cached_run(f"attention-entropy:num_scales=1|skip-scales:count={count}", "square")
    assert same_bits(result, cached_run(f"skip-scales:count={count}", "square"))


@pytest.mark.parametrize("policy", [AttentionEntropyTokens.neutral(), AttentionEntropyTokens(num_scales=0)])
def test_switched_off_is_full(policy: AttentionEntropyTokens):
    result = run(toy("odd"), policy)
    assert same_bits(result, cached_run("full", "odd"))
    assert result.bound.directives == ()
    assert not any(result.bound.record(scale) for scale in range(5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_ratio", 0.0),
        ("keep_ratio", 1.1),
        ("keep_ratio", math.nan),
        ("num_scales", -1),
        ("fill", "none"),
        ("polarity", "middle"),
    ],
)
def test_wrong_settings_are_refused_by_name(field: str, value: object):
    with pytest.raises(FoveateError, match=f"{field} must be .* got {value}"):
        checked(AttentionEntropyTokens(), field, value)


def test_block_must_be_one_of_the_model():
    with pytest.raises(FoveateError, match=r"block must be in \[-5, 4\] of this model, got -6"):
        AttentionEntropyTokens(block=-6).bind(toy("square").schedule, toy("square").model.shape)
