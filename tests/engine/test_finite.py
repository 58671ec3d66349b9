"""Broken numbers never become an image: every part and scale is named, mates stay whole, and a repaired run goes on."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from foveate.core.errors import BrokenNumbersError
from foveate.engine.executor import Engine
from foveate.engine.finite import broken_numbers, check_pixels
from foveate.engine.sample import Filter, KeyedSampler, ReferenceSampler
from foveate.policies.registry import load_policy
from tests.engine.test_company import alone, bound_of, member
from tests.toys import Toy, label_request, make_request, run, toy, toy_var


def broken(subject: Toy, name: str, value: float) -> Toy:
    """The toy with one wrong value in a weight."""
    model = copy.deepcopy(subject.model)
    parameter = dict(model.named_parameters())[name]
    parameter.data.view(-1)[parameter.numel() // 2] = value
    return replace(subject, model=model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule", [Filter(top_k=0, top_p=0.0), Filter(top_k=1, top_p=0.0), Filter(top_k=2, top_p=0.9)], ids=str
)
@pytest.mark.parametrize("is_keyed", [True, False])
def test_a_broken_weight_is_an_error_of_the_first_scale(value: float, rule: Filter, is_keyed: bool):
    subject = broken(toy("square"), "head.bias", value)
    sampler = None if is_keyed else ReferenceSampler(generator=torch.Generator().manual_seed(5))
    request = make_request(subject.schedule, sampler=sampler, rule=rule)
    with pytest.raises(BrokenNumbersError, match=r"images 0, 1, 2: scale 0: the transformer gave logits") as error:
        run(subject, load_policy("full"), request)
    assert error.value.images == (0, 1, 2)


def test_one_wrong_value_in_a_feed_forward_net_is_an_error():
    subject = toy("square")
    name = next(n for n, p in subject.model.named_parameters() if "ffn.fc1.weight" in n)
    with pytest.raises(BrokenNumbersError, match="scale 0: the transformer"):
        run(broken(subject, name, math.nan), load_policy("depthvar"))


def test_logits_that_guidance_takes_out_of_range_are_named():
    subject = toy("odd")
    request = make_request(subject.schedule, weights=(1.0, 1.0, 3e38, 1.0, 1.0))
    with pytest.raises(BrokenNumbersError, match="scale 2: guidance and temperature"):
        run(subject, load_policy("full"), request)


def test_a_broken_codebook_is_named():
    subject = toy_var()
    tokenizer = copy.deepcopy(subject.tokenizer)
    tokenizer.autoencoder.quantize.embedding.weight.data.fill_(math.nan)
    with pytest.raises(BrokenNumbersError, match="scale 0: the codes of the tokenizer"):
        run(replace(subject, tokenizer=tokenizer), load_policy("full"), label_request(subject.schedule))


def test_mates_stay_whole_and_the_request_goes_on_when_it_is_repaired():
    """The temperature of one request is out of range; the others are the same bits, in the same step."""
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    requests = [member(seed) for seed in (20, 23, 26)]
    expected = [alone(engine, bound_of(subject, "ld-pruning", r), r) for r in requests]
    whole = requests[1].temperatures
    requests[1] = replace(requests[1], temperatures=(*whole[:3], 3e-39, whole[4]))
    states = [engine.open(bound_of(subject, "ld-pruning", r), r) for r in requests]
    for scale in range(5):
        outcomes = engine.step(states)
        if scale == 3:
            assert isinstance(outcomes[1], BrokenNumbersError)
            assert states[1].scale == 3
            states[1].request = replace(states[1].request, temperatures=whole)
            (outcomes[1],) = engine.step([states[1]])
        for outcome, latents in zip(outcomes, expected, strict=True):
            assert torch.equal(outcome.f_hat_BZHW, latents[scale])


def test_a_device_is_read_at_the_end_alone():
    """Flags of every scale are kept, and the last one names the first that broke; on the CPU nothing is kept."""
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    request = make_request(subject.schedule, sampler=KeyedSampler(seeds=(1, 2, 3)))
    state = engine.open(bound_of(subject, "full", request), request)
    while state.scale < 4:
        engine.step([state])
    assert state.finite == []
    ok = torch.ones(3, 3, dtype=torch.bool)
    bad = ok.clone()
    bad[1, 2] = False
    state.finite = [ok, ok, bad, ok]
    error = broken_numbers(state, ok)
    assert error is not None
    assert error.images == (2,)
    assert error.reason.startswith("scale 2: guidance")
    state.finite = [ok] * 4
    assert broken_numbers(state, ok) is None
    assert broken_numbers(state, None) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_pixels_are_refused(value: float):
    pixels_B3YX = torch.zeros(3, 3, 4, 4)
    check_pixels(pixels_B3YX)
    pixels_B3YX[1, 2, 3, 0] = value
    with pytest.raises(BrokenNumbersError, match="image 1: the decoder gave pixels"):
        check_pixels(pixels_B3YX)
