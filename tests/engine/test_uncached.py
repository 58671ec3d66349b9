"""A model whose scales see only themselves: nothing is stored for it; against the slow twins and what torch counts."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate.core.composition import Composed
from foveate.engine.forecast import forecast
from foveate.engine.state import bounds_of
from foveate.policies.registry import REGISTRY, load_policy
from tests.engine.naive import decisions_of, generate, generate_planned
from tests.toys import LENGTHS, SEEDS, Toy, cached_run, make_request, run, same_bits, text_features, toy

SPECS = (
    "full",
    "ld-pruning",
    "depthvar:reference_scale=2",
    "skip-scales|random-tokens:keep_ratio=0.6|uniform-depth:num_scales=2|drop-branch:count=3",
    "random-tokens:keep_ratio=0.3,num_scales=1",
)


def forgetful(name: str) -> Toy:
    """The toy of this name, without memory of earlier scales."""
    subject = toy(name)
    model = copy.copy(subject.model)
    model.shape = replace(model.shape, is_cached=False)
    return replace(subject, model=model)


@pytest.mark.parametrize("name", ["square", "patches"])
def test_full_equals_the_plain_loop(name: str):
    subject = forgetful(name)
    request = make_request(subject.schedule)
    f_hats, bits = generate(subject, request, SEEDS)
    ours = run(subject, load_policy("full"), request)
    for scale in range(len(subject.schedule)):
        assert torch.equal(torch.stack(ours.choices[scale].symbols), bits[scale])
        assert torch.equal(ours.f_hats[scale], f_hats[scale])
    assert not same_bits(ours, cached_run("full", name))


def test_neutral_equals_full():
    """All at once; that each neutral policy plans what `full` does is part of the contract tests."""
    subject = forgetful("wide")
    neutral = Composed(parts=tuple(policy.neutral() for policy in REGISTRY.values()))
    assert same_bits(run(subject, neutral), run(subject, load_policy("full")))


@pytest.mark.parametrize("spec", SPECS)
def test_plans_run_as_decided(spec: str):
    subject = forgetful("wide")
    request = make_request(subject.schedule)
    result = run(subject, load_policy(spec), request)
    text = text_features(SEEDS[1], LENGTHS[1])
    page = generate_planned(subject, text, SEEDS[1], decisions_of(result, 1), request)
    for ours, theirs in zip(result.f_hats, page.f_hats, strict=True):
        assert torch.allclose(ours[1], theirs[0], atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_cost_is_known_before_and_nothing_is_stored(spec: str):
    """The scratch holds the keys of one scale, the largest; a pruned last scale may be smaller than the one before."""
    subject, policy = forgetful("wide"), load_policy(spec)
    shape, request = subject.model.shape, make_request(subject.schedule)
    bound = policy.bind(subject.schedule, shape)
    trace = run(subject, bound, request).trace
    before, limit = forecast(bound, request, shape), bounds_of(bound, request, shape)
    assert trace.cost.kv_bytes == before.kv_bytes == 0
    assert trace.cost == before or not bound.is_static
    assert trace.cost.flops <= before.flops
    assert trace.peak_kv_bytes == limit.kv_bytes(shape.width, 4)
    largest = max(max(row.block_tokens) for scale in trace.scales for row in scale.work.rows.values())
    assert limit.scratch_tokens == largest or not bound.is_static
    assert limit.kv_bytes(shape.width, 4) == 2 * 2 * 3 * shape.width * 4 * limit.scratch_tokens


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("spec", ["full", "random-tokens:keep_ratio=0.3,num_scales=1"])
def test_flops_agree_with_those_that_torch_counts(spec: str):
    subject = forgetful("square")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})
    with counter:
        trace = run(subject, load_policy(spec), make_request(subject.schedule, SEEDS[:1], LENGTHS[:1])).trace
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert counter.get_total_flops() - convolutions == trace.cost.flops
    assert trace.cost.flops < cached_run(spec, "square").trace.cost.flops
