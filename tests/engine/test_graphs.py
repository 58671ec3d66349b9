"""Captured prefixes: the bits of the plain loop at the first call, at replays, and whatever ran before or beside it.

No machine of these tests has a GPU, so work is captured by its twin, which calls it again: what a graph would read from
a place that another request has left, the twin reads there too.
"""

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from foveate.core.held import copy_held_, held_bytes, held_copy, zero_held_
from foveate.engine.executor import Engine
from foveate.engine.graphs import DeviceCapture, Graphs
from foveate.engine.state import Request
from foveate.policies.registry import load_policy
from tests.engine.captures import Recalled
from tests.engine.test_uncached import forgetful
from tests.models import test_switti
from tests.toys import SpySampler, Toy, label_request, make_request, toy, toy_var

pytestmark = pytest.mark.soak
"""Graphs are opt-in and have run on no device yet; that replays wait for nothing is part of test_waiting."""

SPECS = (
    "full",
    "ld-pruning",
    "ld-pruning:sats=false",
    "depthvar",
    "drop-branch:count=2",
    "skip-scales:count=1",
    "random-tokens",
)
TOYS: dict[str, Callable[[], Toy]] = {
    "square": lambda: toy("square"),
    "patches": lambda: toy("patches"),
    "var": toy_var,
    "uncached": lambda: forgetful("wide"),
    "switti": lambda: test_switti.subject_of(use_ar=True),
    "switti without memory": lambda: test_switti.subject_of(use_ar=False),
}


@dataclass(kw_only=True)
class Counted:
    """Captures as the twin does, and counts captures and replays."""

    captures: int = 0
    replays: int = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recalled:
        """Captures."""
        self.captures += 1

        def counted() -> Tensor:
            self.replays += 1
            return work()

        return Recalled.capture(counted)


def request_of(subject: Toy, seed: int) -> Request:
    """A request of the toy's kind; texts of the same lengths, other words for other seeds."""
    seeds = (seed, seed + 1, seed + 2)
    if subject.name == "var":
        return label_request(subject.schedule, seeds=seeds, labels=tuple((seed + i) % 10 for i in range(3)))
    if subject.name == "switti":
        return test_switti.request_of(subject, seeds)
    return make_request(subject.schedule, seeds=seeds)


def latents(engine: Engine, spec: str, subject: Toy, request: Request) -> list[Tensor]:
    """Latents of all scales."""
    bound = load_policy(spec).bind(subject.schedule, subject.model.shape)
    return [step.f_hat_BZHW for step in engine.run(bound, request)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether all scales agree, to the bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


CASES = [(name, spec, (40, 10_000)[(i + j) % 2]) for i, name in enumerate(TOYS) for j, spec in enumerate(SPECS)]
"""Every policy on every toy; in turns the first scales or all of them are few tokens enough."""


@pytest.mark.parametrize(("name", "spec", "most_tokens"), CASES)
def test_a_replayed_prefix_is_the_plain_loop(name: str, spec: str, most_tokens: int):
    subject = TOYS[name]()
    capture = Counted()
    graphed = Engine(subject.model, subject.tokenizer, Graphs(capture, most_tokens))
    plain = Engine(subject.model, subject.tokenizer)
    captures = []
    for seed in (3, 11, 19):
        request = request_of(subject, seed)
        assert equal(latents(graphed, spec, subject, request), latents(plain, spec, subject, request))
        captures.append(capture.captures)
    assert captures[0] == 0, "a shape that may never come again is not captured"
    assert captures[1] > 0, "the second request captures"
    if load_policy(spec).bind(subject.schedule, subject.model.shape).is_static:
        assert captures[2] == captures[1], "and the third one finds all of it"
    assert capture.replays > 2 * capture.captures


@pytest.mark.parametrize(
    "spec", ["drop-branch:count=5", "uniform-depth:num_scales=4", "depthvar:reference_scale=0", "skip-scales:count=4"]
)
def test_a_policy_that_leaves_at_once_finds_nothing_of_the_request_before(spec: str):
    subject = toy("square")
    graphed = Engine(subject.model, subject.tokenizer, Graphs(Counted()))
    plain = Engine(subject.model, subject.tokenizer)
    for seed in (3, 5, 7):
        latents(graphed, "full", subject, request_of(subject, seed))
    request = request_of(subject, 9)
    assert equal(latents(graphed, spec, subject, request), latents(plain, spec, subject, request))


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_what_cannot_be_captured_runs_without_graphs(fails_at: int, caplog: pytest.LogCaptureFixture):
    subject = toy("square")
    capture = Counted()

    def failing(work: Callable[[], Tensor]) -> Recalled:
        if capture.captures == fails_at:
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return capture(work)

    graphed = Engine(subject.model, subject.tokenizer, Graphs(failing))
    plain = Engine(subject.model, subject.tokenizer)
    for seed in (3, 5, 7, 9):
        request = request_of(subject, seed)
        assert equal(latents(graphed, "full", subject, request), latents(plain, "full", subject, request))
    (warning,) = [record.message for record in caplog.records if "could not be captured" in record.message]
    assert warning.endswith("when stream is capturing")


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch):
    """A device's graph holds no tensor: what only the recorded function held would be somebody else's memory."""
    monkeypatch.setattr("foveate.engine.graphs._spoil_", lambda over, expected: None)
    monkeypatch.setattr("foveate.engine.graphs._agree", lambda found, expected: True)
    subject = toy("square")
    kept: list[weakref.ref[Tensor]] = []

    def remember(work: Callable[[], Tensor]) -> Recalled:
        cells = [cell.cell_contents for cell in inspect.unwrap(work).__closure__ or ()]
        read = [weakref.ref(held) for held in cells if isinstance(held, Tensor)]
        assert len(read) == 2, "hidden states and positions"
        out = work()
        kept.extend(read)
        return Recalled(work=lambda: out, out=out)

    graphed = Engine(subject.model, subject.tokenizer, Graphs(remember))
    for seed in (3, 5):
        latents(graphed, "full", subject, request_of(subject, seed))
    gc.collect()
    assert kept
    assert all(tensor() is not None for tensor in kept)


def test_a_shape_without_memory_for_its_buffers_takes_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    subject = toy("square")
    graphs = Graphs(Counted())

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 600 MiB\nmore")

    monkeypatch.setattr(graphs, "_build", full)
    graphed = Engine(subject.model, subject.tokenizer, graphs)
    plain = Engine(subject.model, subject.tokenizer)
    for seed in (3, 5, 7, 9):
        request = request_of(subject, seed)
        assert equal(latents(graphed, "full", subject, request), latents(plain, "full", subject, request))
    (warning,) = [record.message for record in caplog.records if "no memory for it" in record.message]
    assert warning.endswith("CUDA out of memory. Tried to allocate 600 MiB")


def test_traces_count_what_was_replayed():
    subject = toy("square")
    bound = load_policy("ld-pruning").bind(subject.schedule, subject.model.shape)
    engines = (Engine(subject.model, subject.tokenizer, Graphs(Counted())), Engine(subject.model, subject.tokenizer))
    for seed in (3, 4):
        ours, theirs = ([*engine.run(bound, request_of(subject, seed))][-1].trace for engine in engines)
        for one, other in zip(ours.scales, theirs.scales, strict=True):
            assert one.work == other.work
            assert torch.equal(one.keep_Bl, other.keep_Bl)
            assert torch.equal(one.depth_Bl, other.depth_Bl)


def test_requests_side_by_side_do_not_share_buffers():
    subject = toy("square")
    graphed = Engine(subject.model, subject.tokenizer, Graphs(Counted()))
    plain = Engine(subject.model, subject.tokenizer)
    bound = load_policy("full").bind(subject.schedule, subject.model.shape)
    requests = [request_of(subject, seed) for seed in (3, 11, 19)]
    latents(graphed, "full", subject, requests[0])
    steps = [[] for _ in requests]
    runs = [graphed.run(bound, request) for request in requests]
    for _ in subject.schedule.scales:
        for step, running in zip(steps, runs, strict=True):
            step.append(next(running).f_hat_BZHW)
    for step, request in zip(steps, requests, strict=True):
        assert equal(step, latents(plain, "full", subject, request))


@pytest.mark.parametrize("scale", [0, 2, 4])
def test_a_request_that_ends_early_leaves_no_trace(scale: int):
    subject = toy("square")
    capture = Counted()
    graphed = Engine(subject.model, subject.tokenizer, Graphs(capture))
    plain = Engine(subject.model, subject.tokenizer)
    bound = load_policy("full").bind(subject.schedule, subject.model.shape)
    for seed in (3, 5):
        latents(graphed, "full", subject, request_of(subject, seed))
    known = capture.captures
    failing = request_of(subject, 7)
    failing = replace(failing, sampler=SpySampler(inner=failing.sampler, fails_at=scale))
    with pytest.raises(RuntimeError, match="the toy broke"):
        list(graphed.run(bound, failing))
    with closing(graphed.run(bound, request_of(subject, 9))) as cancelled:
        for _ in range(scale + 1):
            next(cancelled)
    request = request_of(subject, 13)
    assert equal(latents(graphed, "full", subject, request), latents(plain, "full", subject, request))
    assert capture.captures == known, "both leases were given back, so this one was replayed"


def test_shapes_do_not_mix():
    """Other text lengths, other guidance from the start and other batches have graphs of their own."""
    subject = toy("square")
    capture = Counted()
    graphed = Engine(subject.model, subject.tokenizer, Graphs(capture))
    plain = Engine(subject.model, subject.tokenizer)
    requests = [
        make_request(subject.schedule),
        make_request(subject.schedule, lengths=(5, 9, 6)),
        make_request(subject.schedule, weights=(1.0,) * 5),
        make_request(subject.schedule, seeds=(1, 2), lengths=(5, 9)),
        make_request(subject.schedule, hidden_blocks=(2,)),
    ]
    for request in requests * 3:
        assert equal(latents(graphed, "full", subject, request), latents(plain, "full", subject, request))
    assert capture.captures == 4 * len(subject.schedule), "guidance inside the blocks is never captured"


def test_the_shape_that_was_used_longest_ago_is_forgotten():
    subject = toy("square")
    capture = Counted()
    engine = Engine(subject.model, subject.tokenizer, Graphs(capture, most_shapes=2))

    def new_captures(length: int, times: int) -> int:
        before = capture.captures
        for _ in range(times):
            latents(engine, "full", subject, make_request(subject.schedule, (1,), (length,)))
        return capture.captures - before

    scales = len(subject.schedule)
    assert [new_captures(length, 2) for length in (1, 2, 1)] == [scales, scales, 0]
    assert new_captures(3, 2) == scales
    assert new_captures(1, 1) == 0, "known: 2 was used longest ago"
    assert new_captures(2, 2) == scales, "forgotten, so it is captured at its second request again"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("spec", ["full", "ld-pruning", "drop-branch:count=2"])
def test_graphs_of_a_device_replay_the_plain_loop(spec: str):
    there, subject = torch.device("cuda:0"), toy("square")
    tokenizer = copy.copy(subject.tokenizer)
    tokenizer.autoencoder = copy.deepcopy(tokenizer.autoencoder).to(there)
    model = copy.deepcopy(subject.model).to(there)
    graphed, plain = Engine(model, tokenizer, Graphs(DeviceCapture(there))), Engine(model, tokenizer)
    for seed in (3, 11, 19):
        request = request_of(subject, seed)
        request = replace(request, conditions=tuple(text.to(there) for text in request.conditions))
        assert equal(latents(graphed, spec, subject, request), latents(plain, spec, subject, request))


@dataclass(frozen=True, slots=True)
class Pair:
    """Something that a model might prepare."""

    first: Tensor
    rest: tuple[dict[str, Tensor], int]


def test_records_are_copied_tensor_by_tensor():
    record = Pair(torch.arange(3.0), ({"a": torch.ones(2)}, 4))
    copied = held_copy(record)
    record.first.add_(1)
    assert torch.equal(copied.first, torch.arange(3.0))
    assert copied.rest[1] == 4
    assert held_bytes(copied) == held_bytes(record)
    copy_held_(copied, record)
    assert torch.equal(copied.first, record.first)
    assert copied.first is not record.first
    with pytest.raises(ValueError, match="shorter|longer"):
        copy_held_(copied, record.first)
    places = torch.arange(2)
    zero_held_((copied, places))
    assert not copied.first.any()
    assert not copied.rest[0]["a"].any()
    assert places[1] == 1, "an index stays"
