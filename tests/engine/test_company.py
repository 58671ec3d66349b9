"""Alone and in company: an image is the same bit for bit, whatever shares its products, joins, leaves or fails."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from foveate.core.policy import Bound
from foveate.core.schedule import ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler, ReferenceSampler
from foveate.engine.state import Request, RequestState
from foveate.kernels.invariance import tile_failing_
from foveate.policies.registry import load_policy
from tests.engine.test_invariants import ACTIVE
from tests.models import test_switti
from tests.toys import GRIDS, SpySampler, Toy, label_request, make_request, toy, toy_var, with_sampler

SCHEDULES = {
    "square": ScaleSchedule.from_grids(GRIDS["square"][0]),
    "wide": ScaleSchedule.from_grids(GRIDS["wide"][0]),
    "odd": ScaleSchedule.from_grids(GRIDS["odd"][0]),
}
"""Sizes that one model draws side by side."""


def member(seed: int) -> Request:
    """A request of one image whose size, guidance, prompt length and filters follow from its seed."""
    schedule = list(SCHEDULES.values())[seed % 3]
    weights = ((2.0, 2.5, 3.0, 3.0, 2.0), (1.0, 1.0, 3.0, 1.0, 1.0), (1.0,) * 5, (4.0,) * 5)[seed % 4]
    rule = Filter(top_k=0, top_p=0.9 if seed % 2 else 0.0)
    return make_request(schedule, [seed], [3 + seed % 5], weights, rule=rule, wants_maps=False)


def bound_of(subject: Toy, spec: str, request: Request) -> Bound:
    return load_policy(spec).bind(request.schedule, subject.model.shape)


def alone(engine: Engine, bound: Bound, request: Request) -> list[torch.Tensor]:
    """The latent after every scale."""
    return [step.f_hat_BZHW for step in engine.run(bound, request)]


Seen = dict[int, torch.Tensor]
"""Logits of every scale that ran: they show a difference that no code shows."""


def seen_alone(engine: Engine, bound: Bound, request: Request) -> tuple[list[torch.Tensor], Seen]:
    """Latents and logits of a request by itself."""
    spy = SpySampler(inner=request.sampler)
    latents = alone(engine, bound, with_sampler(request, spy))
    return latents, {scale: choice.logits[0] for scale, choice in spy.choices.items()}


@cache
def known_alone(spec: str, seed: int, dtype: torch.dtype, kernels: str) -> tuple[list[torch.Tensor], Seen]:
    """What a member sees that runs by itself."""
    subject = probed(dtype, kernels)
    request = member(seed)
    return seen_alone(Engine(subject.model, subject.tokenizer), bound_of(subject, spec, request), request)


@cache
def probed(dtype: torch.dtype, kernels: str) -> Toy:
    """The toy of bits, its linear layers probed as at loading, with the kernels and threads of now."""
    subject = toy("square", dtype)
    model = copy.deepcopy(subject.model)
    tile_failing_([model.block(index) for index in range(subject.num_blocks)], [model.head])
    return replace(subject, model=model)


ONCE = [0, *(pytest.param(group, marks=pytest.mark.soak) for group in (1, 2))]
"""One of the companies; every policy has company in `test_an_image_is_the_same_alone_and_in_company`."""

SOAKED = ((torch.float32, 1), (torch.bfloat16, 2))
"""Float32 on one thread runs where members fail and other families have company."""

GROUPS = tuple(ACTIVE[first::3] for first in range(3))
"""Every active policy, in companies of eight or so."""


def assert_company(specs: Sequence[str], dtype: torch.dtype, kernels: str, *, fails: bool = False) -> None:
    """A company on the toy of bits, one policy each, against every member alone."""
    subject = probed(dtype, kernels)
    expected = [known_alone(spec, 20 + i, dtype, kernels) for i, spec in enumerate(specs)]
    members = [(spec, member(20 + i)) for i, spec in enumerate(specs)]
    assert_same_in_company(Engine(subject.model, subject.tokenizer), subject, members, expected, fails=fails)


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def replaced(before: Sequence[RequestState], engine: Engine, subject: Toy, spec: str, request: Request) -> RequestState:
    """Cancels requests and opens another."""
    for state in before:
        state.release()
    return engine.open(bound_of(subject, spec, request), request)


def assert_same_in_company(  # noqa: C901 - one loop over steps, shared by all tests here
    engine: Engine,
    subject: Toy,
    members: Sequence[tuple[str, Request]],
    expected: Sequence[tuple[list[torch.Tensor], Seen]] | None = None,
    *,
    fails: bool = False,
) -> None:
    """All latents and logits of all members, joining one after the other, equal those of each alone.

    With `fails` every member raises once behind its blocks, at one scale or another, and goes on at the next step; and
    every second step a stranger joins that is cancelled after two scales.
    """
    if expected is None:
        expected = [seen_alone(engine, bound_of(subject, spec, request), request) for spec, request in members]
    spies = [SpySampler(inner=request.sampler) for _, request in members]
    members = [(spec, with_sampler(request, spy)) for (spec, request), spy in zip(members, spies, strict=True)]
    for i, spy in enumerate(spies):
        spy.fails_at = 1 + i % 4 if fails else None
    states: list[RequestState | None] = [None] * len(members)
    found: list[list[torch.Tensor]] = [[] for _ in members]
    stranger, failures = [], 0
    for tick in itertools.count():
        for i in (2 * tick, 2 * tick + 1):
            if i < len(members):
                states[i] = engine.open(bound_of(subject, *members[i]), members[i][1])
        there = [i for i, state in enumerate(states) if state is not None and not state.is_done]
        if not there:
            break
        if fails and tick % 2 == 0:
            stranger = [replaced(stranger, engine, subject, *members[tick % len(members)])]
        outcomes = engine.step([*(states[i] for i in there), *stranger])
        for i, outcome in zip(there, outcomes, strict=False):
            if isinstance(outcome, Exception):
                assert str(outcome) == "the toy broke"
                assert states[i].scale == spies[i].fails_at == len(found[i])
                spies[i].fails_at, failures = None, failures + 1
            else:
                found[i].append(outcome.f_hat_BZHW)
    # A scale that a policy skips draws nothing, so nothing fails there.
    assert failures == (sum(1 + i % 4 in logits for i, (_, logits) in enumerate(expected)) if fails else 0)
    for ours, spy, (latents, logits) in zip(found, spies, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, latents, strict=True))
        assert spy.choices.keys() == logits.keys()
        assert all(torch.equal(choice.logits[0], logits[scale]) for scale, choice in spy.choices.items())


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 2), (torch.bfloat16, 1), *(pytest.param(*both, marks=pytest.mark.soak) for both in SOAKED)],
)
@pytest.mark.parametrize("group", range(3))
def test_an_image_is_the_same_alone_and_in_company(group: int, dtype: torch.dtype, threads: int):
    """Every policy, among other sizes, guidance and prompts; two join at every step, each leaves when done."""
    with threads_of(threads):
        assert_company(GROUPS[group], dtype, f"native, {threads} threads")


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.soak)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", ONCE)
def test_an_image_is_the_same_in_plain_torch(group: int, dtype: torch.dtype, threads: int):
    with threads_of(threads):
        assert_company(GROUPS[group], dtype, f"plain, {threads} threads")


@pytest.mark.parametrize(
    ("family", "group"),
    [
        pytest.param(family, group, marks=() if first == group else pytest.mark.soak)
        for first, family in enumerate(("patches", "var", "switti"))
        for group in range(3)
    ],
)
def test_every_family_has_company(family: str, group: int):
    """2x2 latents a token; codebooks; and a model that keeps no keys: every policy on one of them, the rest soak."""
    seeds = range(len(GROUPS[group]))
    if family == "switti":
        # As published, a width of which vectors leave no rest: torch computes those by other code.
        subject = test_switti.subject_of(use_ar=False, ff_width=192)
        requests = [test_switti.request_of(subject, [seed], [3 + seed]) for seed in seeds]
    elif family == "var":
        subject = toy_var()
        requests = [label_request(subject.schedule, [seed], [1 + seed]) for seed in seeds]
    else:
        subject = toy("patches")
        requests = [make_request(subject.schedule, [seed], [3 + seed], wants_maps=False) for seed in seeds]
    # Logits are not spread over ids of a codebook; the difference of the branches is.
    specs = [spec if family == "patches" or "fovea" not in spec else "fovea:shares=[]" for spec in GROUPS[group]]
    members = list(zip(specs, requests, strict=True))
    assert_same_in_company(Engine(subject.model, subject.tokenizer), subject, members)


@pytest.mark.parametrize("group", ONCE)
def test_neighbours_that_fail_or_are_cancelled_change_nothing(group: int):
    """Only the one that fails is answered with its error; it is as it was and goes on when the cause is gone."""
    assert_company(GROUPS[group], torch.float32, f"native, {torch.get_num_threads()} threads", fails=True)


def test_a_scale_that_fails_leaves_its_request_as_it_was():
    """Cache, policy, trace and the order of draws: after the failure the run goes on to the same image."""
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    plain = make_request(subject.schedule, sampler=ReferenceSampler(generator=torch.Generator().manual_seed(5)))
    expected = alone(engine, bound_of(subject, "ld-pruning|depthvar", plain), plain)

    class FailsAfterDrawing(ReferenceSampler):
        """Draws, and fails once."""

        is_broken = True

        def choose(self, scale, grid, logits, kept, rule):
            drawn = ReferenceSampler.choose(self, scale, grid, logits, kept, rule)
            if scale == 4 and FailsAfterDrawing.is_broken:
                FailsAfterDrawing.is_broken = False
                raise RuntimeError("the toy broke")
            return drawn

    request = with_sampler(plain, FailsAfterDrawing(generator=torch.Generator().manual_seed(5)))
    state = engine.open(bound_of(subject, "ld-pruning|depthvar", request), request)
    found = []
    while not state.is_done:
        lengths, scales = [list(block) for block in state.cache.lengths], len(state.trace.scales)
        (outcome,) = engine.step([state])
        if isinstance(outcome, Exception):
            assert [list(block) for block in state.cache.lengths] == lengths
            assert len(state.trace.scales) == scales
        else:
            found.append(outcome.f_hat_BZHW)
    assert not FailsAfterDrawing.is_broken
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_was_prepared_is_joined_only_when_the_company_changes():
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    states = [engine.open(bound_of(subject, "full", member(seed)), member(seed)) for seed in (20, 24)]
    seen = []
    for _ in range(3):
        engine.step(states)
        seen.append(states[0].joined)
    assert seen[0] is seen[1] is seen[2] is states[1].joined
    engine.step([*states, engine.open(bound_of(subject, "full", member(28)), member(28))])
    assert states[0].joined is not seen[0]


def test_the_time_of_a_step_is_shared():
    """Times of members add up to no more than the time that passed."""
    import time  # noqa: PLC0415 - of this test alone

    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    began = time.perf_counter()
    states = [engine.open(bound_of(subject, "full", member(seed)), member(seed)) for seed in range(6)]
    while not states[0].is_done:
        engine.step(states)
    passed_ms = 1e3 * (time.perf_counter() - began)
    assert 0 < sum(state.trace.transformer_ms for state in states) <= passed_ms
    assert all(len(state.trace.scales) == 5 for state in states)


def test_keyed_seeds_of_equal_requests_differ_only_by_seed():
    subject = toy("square")
    engine = Engine(subject.model, subject.tokenizer)
    requests = [with_sampler(member(20), KeyedSampler(seeds=(seed,))) for seed in (1, 1, 2)]
    states = [engine.open(bound_of(subject, "full", r), r) for r in requests]
    while not states[0].is_done:
        first, second, third = (step.f_hat_BZHW for step in engine.step(states))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
