"""The promises of `test_invariants` on the bundled model with its own text encoder; every policy in `make soak`."""

import gc
from collections.abc import Iterator

import pytest
import torch

from foveate.core.composition import Composed
from foveate.core.guidance import GuidanceSchedule
from foveate.engine.forecast import forecast, full_cost
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request, bounds_of
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import REGISTRY, load_policy
from tests.engine.naive import generate
from tests.engine.test_invariants import ACTIVE, assert_keyed, assert_nothing_stays, same_choice, total_after
from tests.randomness import few
from tests.toys import Result, Toy, run, same_bits

PROMPTS = ("a hamburger", "a green cactus in the desert of the south")
SEEDS = (7, 8)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    pipe = Pipeline.from_pretrained("emoji-tiny")
    pipe.set_progress_bar_config(disable=True)
    gc.collect()
    gc.freeze()
    yield pipe
    gc.unfreeze()


@pytest.fixture(scope="module")
def subject(pipe: Pipeline) -> Toy:
    model = pipe.model
    return Toy(
        name="emoji-tiny", model=model.transformer, tokenizer=model.tokenizer, schedule=model.spec.default_schedule
    )


@pytest.fixture(scope="module")
def request_of(pipe: Pipeline):
    schedule = pipe.model.spec.default_schedule
    count = len(schedule)
    conditions = tuple(pipe.model.text.encode(list(PROMPTS)))

    def make(*images: int) -> Request:
        return Request(
            schedule=schedule,
            guidance=GuidanceSchedule.from_infinity(2.5, count),
            temperatures=(0.5,) * count,
            filters=(Filter(top_k=0, top_p=0.0),) * count,
            sampler=KeyedSampler(seeds=tuple(SEEDS[i] for i in images)),
            conditions=tuple(conditions[i] for i in images),
            num_images=len(images),
        )

    return make


@pytest.fixture(scope="module")
def full(subject: Toy, request_of) -> Result:
    return run(subject, REGISTRY["full"].neutral(), request_of(0, 1))


def test_full_equals_the_plain_loop(subject: Toy, request_of, full: Result):
    f_hats, bits = generate(subject, request_of(0, 1), SEEDS)
    for scale in range(len(subject.schedule)):
        assert torch.equal(torch.stack(full.choices[scale].symbols), bits[scale])
        assert torch.equal(full.f_hats[scale], f_hats[scale])


def test_neutral_equals_full(subject: Toy, request_of, full: Result):
    neutral = Composed(parts=tuple(policy.neutral() for policy in REGISTRY.values()))
    assert same_bits(run(subject, neutral, request_of(0, 1)), full)


SOME = few(ACTIVE, "ld-pruning|depthvar", more=1)
"""What toys do not show are real texts and sizes, and those are the same for every policy."""


@pytest.mark.parametrize("spec", SOME)
def test_one_request(spec: str, subject: Toy, request_of, full: Result):
    """Draws, costs and cache of one batch, and the same codes for each of its images alone."""
    policy, request = load_policy(spec), request_of(0, 1)
    bound = policy.bind(subject.schedule, subject.model.shape)
    before = forecast(bound, request, subject.model.shape)
    batch = run(subject, policy, request)
    assert same_bits(batch, full) == (spec == "full")
    counted = total_after(batch.trace)
    assert counted == batch.trace.cost
    for name in ("flops", "tokens", "kv_bytes"):
        planned, ran = getattr(before, name), getattr(counted, name)
        assert planned == ran if bound.is_static else planned >= ran
    assert counted.flops <= full_cost(request, subject.model.shape).flops
    limit = bounds_of(bound, request, subject.model.shape).kv_bytes(subject.model.shape.width, 4)
    assert batch.trace.peak_kv_bytes == limit
    assert_keyed(batch, subject.schedule, SEEDS)
    for image in (0, 1):
        alone = run(subject, policy, request_of(image))
        assert alone.choices.keys() == batch.choices.keys()
        for scale in alone.choices:
            if not same_choice(alone, batch, image, scale, SEEDS[image], subject.schedule):
                break
        else:
            assert torch.allclose(alone.f_hat[0], batch.f_hat[image], atol=1e-4)


@pytest.mark.parametrize("spec", SOME)
def test_batch_invariant_mode_gives_the_same_bits(spec: str, pipe: Pipeline):
    options = {"policy": spec, "output_type": "latent", "batch_invariant": True}
    alone = pipe(PROMPTS[1], seed=SEEDS[1], **options).images
    batch = pipe([PROMPTS[0], PROMPTS[1]], seed=list(SEEDS), **options).images
    assert torch.equal(batch[1], alone[0])


@pytest.mark.soak
@pytest.mark.parametrize("spec", ACTIVE)
def test_broken_request_leaves_nothing(spec: str, subject: Toy, request_of):
    policy, request = load_policy(spec), request_of(0)
    assert_nothing_stays(subject, policy, request, run(subject, policy, request))
