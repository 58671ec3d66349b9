"""The check of a captured scale refuses graphs that fail as those of a device can fail; the plain loop runs then."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate.core.held import copy_held_, held_copy
from foveate.engine.executor import Engine
from foveate.engine.graphs import Captured, Graphs, Prefix, _agree, _spoil_
from foveate.engine.kv_cache import KVCache
from foveate.policies.registry import load_policy
from tests.engine.captures import Recalled
from tests.toys import make_request, toy

Work = Callable[[], Tensor]
Broken = Callable[[Work, Prefix], Callable[[Tensor], None]]
"""Records work of a prefix and returns what its replay does with the output's buffer."""

REFUSED = "one shape runs without captured graphs: a replay differs from the plain loop by more than 1e-05"


@dataclass(kw_only=True)
class Fake:
    """A graph whose replay is not the work that was recorded."""

    out: Tensor
    does: Callable[[Tensor], None]

    def replay(self) -> None:
        """Does something else."""
        self.does(self.out)


def stored(cache: KVCache) -> tuple[Tensor, ...]:
    """Keys and values of all blocks, what was never written included."""
    return (*cache.k_RNMD, *cache.v_RNMD)


def does_nothing(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """A graph that was recorded empty."""
    return lambda out: None


def writes_no_keys(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """Its keys and values go where nobody reads them."""

    def replay(out: Tensor) -> None:
        kept = held_copy(stored(prefix.cache))
        out.copy_(work())
        copy_held_(stored(prefix.cache), kept)

    return replay


def writes_only_keys(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """Its logits go where nobody reads them."""
    return lambda out: (work(), None)[1]


def repeats_what_it_recorded(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """It reads nothing: everything comes from a copy."""
    written = held_copy((work(), *stored(prefix.cache)))
    return lambda out: copy_held_((out, *stored(prefix.cache)), written)


def reads_stale_conditions(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """It reads the texts of the request that was recorded."""
    stale = held_copy(prefix.prepared)

    def replay(out: Tensor) -> None:
        own, prefix.prepared = prefix.prepared, stale
        out.copy_(work())
        prefix.prepared = own

    return replay


def reads_stale_keys(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """It reads earlier scales of the request that was recorded, and writes its own keys where they belong."""
    stale, held = held_copy(stored(prefix.cache)), prefix.cache.lengths[0][0]

    def replay(out: Tensor) -> None:
        kept = held_copy(stored(prefix.cache))
        copy_held_(stored(prefix.cache), stale)
        out.copy_(work())
        copy_held_([part[:, :, :held] for part in stored(prefix.cache)], [part[:, :, :held] for part in kept])

    return replay


def starts_slightly_off(work: Work, prefix: Prefix) -> Callable[[Tensor], None]:
    """One value of the first scale is wrong by a tenth; the cache has room for more behind it."""

    def replay(out: Tensor) -> None:
        out.copy_(work())
        if prefix.done == 0:
            prefix.cache.v_RNMD[-1][0, 0, 0, 0] += 0.1

    return replay


def run(capture: Callable[[Graphs, Work], Captured], most_tokens: int = 40) -> tuple[Graphs, bool]:
    """Three requests of one shape: the graphs, and whether all latents are those of the plain loop."""
    subject = toy("square")

    def captured(work: Work) -> Captured:
        return capture(graphs, work)

    graphs = Graphs(captured, most_tokens)
    engines = (Engine(subject.model, subject.tokenizer, graphs), Engine(subject.model, subject.tokenizer))
    bound = load_policy("full").bind(subject.schedule, subject.model.shape)
    are_equal = True
    for seed in (3, 11, 19):
        request = make_request(subject.schedule, seeds=(seed,), lengths=(4,))
        ours, theirs = ([step.f_hat_BZHW for step in engine.run(bound, request)] for engine in engines)
        are_equal &= all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return graphs, are_equal


def faked(broken: Broken) -> Callable[[Graphs, Work], Captured]:
    """Captures as a device does, but for what the replay does."""

    def capture(graphs: Graphs, work: Work) -> Captured:
        prefix = graphs._leased
        assert prefix is not None
        does = broken(work, prefix)
        return Fake(out=work(), does=does)

    return capture


def messages(graphs: Graphs) -> list[str]:
    """What reports of later calls say."""
    return [warning.message for warning in graphs.warnings()]


@pytest.mark.parametrize(
    "broken",
    [
        does_nothing,
        writes_no_keys,
        writes_only_keys,
        repeats_what_it_recorded,
        reads_stale_conditions,
        reads_stale_keys,
        starts_slightly_off,
    ],
)
def test_a_graph_that_does_something_else_is_refused(broken: Broken):
    graphs, are_equal = run(faked(broken))
    assert messages(graphs) == [REFUSED]
    assert are_equal


def test_what_a_cache_never_held_does_not_widen_the_tolerance(monkeypatch: pytest.MonkeyPatch):
    allocate = KVCache._empty
    monkeypatch.setattr(KVCache, "_empty", lambda self, *args: allocate(self, *args).fill_(1e6))
    graphs, are_equal = run(faked(starts_slightly_off))
    assert messages(graphs) == [REFUSED]
    assert are_equal


@pytest.mark.parametrize("leftover", [float("nan"), 1e6])
def test_a_graph_that_does_the_work_is_taken_whatever_the_cache_held(monkeypatch: pytest.MonkeyPatch, leftover: float):
    allocate = KVCache._empty
    monkeypatch.setattr(KVCache, "_empty", lambda self, *args: allocate(self, *args).fill_(leftover))
    graphs, are_equal = run(lambda _, work: Recalled.capture(work), most_tokens=10_000)
    assert messages(graphs) == []
    assert are_equal


def test_what_was_spoilt_never_agrees():
    """A request with broken numbers may expect NaN, which agrees with NaN."""
    expected, spoilt = torch.tensor([2.0, 0.0, float("inf"), float("nan")]), torch.zeros(4)
    _spoil_(spoilt, expected)
    assert not any(_agree(ours, theirs) for ours, theirs in zip(spoilt, expected, strict=True))


def test_a_cache_that_stores_nothing_agrees():
    assert _agree(torch.empty(2, 4, 0, 16), torch.empty(2, 4, 0, 16))
