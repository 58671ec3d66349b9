"""The scheduler on the toy: the bits of solo runs in any company, turns, deadlines, faults, memory, and its end."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.core.errors import Cancelled, FoveateError
from foveate.engine.scale_run import ScaleRun
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.runner import OpenCall
from foveate.server.scheduler import Scheduler, SchedulerSettings
from foveate.server.tickets import RequestTicket
from foveate.server.work import (
    ClosingError,
    Event,
    Failed,
    Finished,
    ImageDone,
    LateError,
    QueueFullError,
    ScaleDone,
    Started,
    Work,
)

TIMEOUT_S = 60.0
LAST = 6
"""The toy's last scale."""


class Heard:
    """A listener that keeps what it hears; `then` is called with every event."""

    def __init__(self, then: Callable[[Event], object] | None = None) -> None:
        self.events: list[Event] = []
        self._then, self._over = then, threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._then is not None:
            self._then(event)
        if isinstance(event, Failed | Finished):
            self._over.set()

    def wait(self) -> "Heard":
        assert self._over.wait(TIMEOUT_S), f"heard {self.events[-1:]} and then nothing"
        return self

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def images(self) -> list[np.ndarray]:
        done = sorted(self.of(ImageDone), key=lambda event: event.index)
        return [np.asarray(event.output.images[0]) for event in done]

    @property
    def error(self) -> Exception:
        (failed,) = self.of(Failed)
        return failed.error


@pytest.fixture
def start(toy_pipe: Pipeline) -> Iterator[Callable[..., Scheduler]]:
    """Starts schedulers and closes them in the end."""
    started: list[Scheduler] = []

    def make(**settings: Any) -> Scheduler:
        started.append(Scheduler(toy_pipe, SchedulerSettings(**settings)))
        started[-1].start()
        return started[-1]

    yield make
    for scheduler in started:
        scheduler.close(0.0)
        assert scheduler.stats().running_images == scheduler.stats().queued_images == 0
        assert scheduler.stats().reserved_bytes == 0


def work(pipe: Pipeline, prompt: str = "a red cat", *, key: str = "k", extra: Any = None, **options: Any) -> Work:
    """`extra` are fields of the work, the rest options of the call."""
    return Work(job=pipe.job(prompt, {"seed": 1, **options}), key=key, **(extra or {}))


def alone(pipe: Pipeline, prompt: str = "a red cat", **options: Any) -> list[np.ndarray]:
    images = pipe(prompt, **{"seed": 1, **options}).images
    return [np.asarray(image) for image in images]


def equal(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


MIXED: list[tuple[str, dict[str, Any]]] = [
    ("a red cat", {"seed": 3, "num_images_per_prompt": 2}),
    ("two big dogs on the left of the house", {"policy": "ld-pruning", "seed": 5}),
    ("a cat", {"policy": "fovea", "negative_prompt": "a dog"}),
    ("a dog", {"aspect_ratio": "4:3", "guidance_scale": 1.0}),
    ("a house", {"policy": "drop-branch:count=2", "temperature": 0.7}),
]


def test_images_have_the_bits_of_solo_runs_whatever_joins(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    """The second half joins while the first is at its third scale; others fail and are cancelled beside them."""
    scheduler = start(max_images=16)
    later = [Heard() for _ in MIXED[2:]]

    def join(event: Event) -> None:
        if isinstance(event, ScaleDone) and event.scale == 2 and event.index == 0:
            for (prompt, options), heard in zip(MIXED[2:], later, strict=True):
                scheduler.submit(work(toy_pipe, prompt, **options), heard)
            cancelled = Heard(lambda event: isinstance(event, ScaleDone) and ticket[0].cancel())
            ticket.append(scheduler.submit(work(toy_pipe, "gone"), cancelled))

    ticket: list[RequestTicket] = []
    first = [Heard(join), Heard()]
    for (prompt, options), heard in zip(MIXED[:2], first, strict=True):
        scheduler.submit(work(toy_pipe, prompt, **options), heard)
    companies = []
    for (prompt, options), heard in zip(MIXED, [*first, *later], strict=True):
        assert equal(heard.wait().images, alone(toy_pipe, prompt, **options)), prompt
        assert heard.of(Finished)
        assert not heard.of(Failed)
        companies += [event.company for event in heard.of(ScaleDone)]
    assert max(companies) >= 5


def test_events_say_what_ran(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    heard = Heard()
    asked = work(toy_pipe, policy="ld-pruning", num_images_per_prompt=2, extra={"partials": 3, "wants_maps": True})
    start().submit(asked, heard)
    heard.wait()
    assert [type(event) for event in heard.events[:2]] == [Started, Started]
    for index in range(2):
        scales = [event for event in heard.of(ScaleDone) if event.index == index]
        assert [event.scale for event in scales] == list(range(LAST + 1))
        assert [event.partial for event in scales if event.partial is not None] == [0, 1, 2]
        for event in scales:
            assert (event.image is not None) == (event.partial is not None)
            assert event.depth_hw is not None
            assert event.depth_hw.shape == event.grid
            assert event.tokens_run == int((event.depth_hw > 0).sum()) <= event.tokens_full
            assert 0 <= event.flops <= event.flops_full
            if event.image is not None:
                assert event.image.size == (256, 256)
    assert min(event.tokens_run / event.tokens_full for event in heard.of(ScaleDone)) < 1
    assert [done.scales for done in heard.of(ImageDone)] == [LAST + 1] * 2


def test_every_scale_comes_with_its_image_if_asked(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    heard = Heard()
    start().submit(work(toy_pipe, extra={"every_scale": True}), heard)
    images = [event.image for event in heard.wait().of(ScaleDone)]
    assert heard.of(Failed) == []
    assert all(isinstance(image, Image.Image) for image in images[:-1])
    assert images[-1] is None, "the last one is the image itself"


def test_small_scales_are_packed_and_large_ones_run_in_turns(
    toy_pipe: Pipeline, start: Callable[..., Scheduler]
) -> None:
    """A newcomer waits for one large scale at most: its small ones go before the next one of anybody."""
    scheduler = start()
    flops = toy_flops(scheduler, toy_pipe)
    limit = (flops[3] + flops[4]) / 2 / 1e9
    scheduler.rates.fit = lambda points=None: None  # type: ignore[method-assign]
    scheduler.rates.fixed_ms, scheduler.rates.ms_per_gflop = 0.0, 1.0
    scheduler.rates.is_small = lambda number: number < limit * 1e9  # type: ignore[method-assign]
    log: list[tuple[str, int, int]] = []
    newcomer = Heard(lambda event: isinstance(event, ScaleDone) and log.append(("new", event.scale, event.company)))

    def note(event: Event) -> None:
        if isinstance(event, ScaleDone):
            log.append(("old", event.scale, event.company))
            if event.scale == 4 and not any(who == "sent" for who, _, _ in log):
                log.append(("sent", 0, 0))
                scheduler.submit(work(toy_pipe, "a dog"), newcomer)

    old = Heard(note)
    scheduler.submit(work(toy_pipe, num_images_per_prompt=3), old)
    old.wait(), newcomer.wait()
    assert {company for who, scale, company in log if who == "old" and scale < 4} == {3}
    assert {company for who, scale, company in log if scale == LAST} == {1}
    # Two scales of 64 tokens are less than one of 256, three of 144 are more.
    assert max(company for who, scale, company in log if scale == 4) > 1
    assert max(company for who, scale, company in log if scale == 5) < 3
    # What ran in the same batch is still told.
    behind = [entry for entry in log[log.index(("sent", 0, 0)) + 1 :] if entry[:2] != ("old", 4)]
    assert [(who, scale) for who, scale, _ in behind[:4]] == [("new", scale) for scale in range(4)]
    assert equal(old.images, alone(toy_pipe, num_images_per_prompt=3))


def toy_flops(scheduler: Scheduler, pipe: Pipeline) -> tuple[float, ...]:
    return scheduler._forecast(pipe.job("a cat", {"seed": 1})).flops


def test_a_failing_neighbour_leaves_no_trace(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out inside a block of one image, at its fourth scale."""
    scheduler, advance = start(), toy_pipe.runner.engine._advance

    def fail(states: Any) -> Any:
        if any(state.scale == 3 and state.request.sampler.seed_of(0) == 13 for state in states):
            raise MemoryError("a block found no room")
        return advance(states)

    monkeypatch.setattr(toy_pipe.runner.engine, "_advance", fail)
    bad, good = Heard(), Heard()
    scheduler.submit(work(toy_pipe, seed=12, num_images_per_prompt=2), bad)
    scheduler.submit(work(toy_pipe), good)
    assert isinstance(bad.wait().error, MemoryError)
    assert equal(good.wait().images, alone(toy_pipe))


def test_a_cancelled_request_stops_and_frees_what_it_held(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler = start()
    tickets: list[RequestTicket] = []
    heard = Heard(lambda event: isinstance(event, ScaleDone) and event.scale == 2 and tickets[0].cancel())
    tickets.append(scheduler.submit(work(toy_pipe, num_images_per_prompt=2), heard))
    assert isinstance(heard.wait().error, Cancelled)
    assert max(event.scale for event in heard.of(ScaleDone)) == 2
    assert not heard.of(ImageDone)


def test_a_listener_that_fails_ends_its_own_request(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler, good = start(), Heard()

    def broken(event: Event) -> None:
        if isinstance(event, ScaleDone):
            raise RuntimeError("the client is gone")

    scheduler.submit(work(toy_pipe, seed=9), broken)
    scheduler.submit(work(toy_pipe), good)
    assert equal(good.wait().images, alone(toy_pipe))


def test_a_full_queue_says_when_to_come_again(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler = start(max_images=1, max_queue=2)
    gate, first = threading.Event(), threading.Event()
    held = Heard(lambda event: (first.set(), gate.wait(TIMEOUT_S)) if isinstance(event, Started) else None)
    scheduler.submit(work(toy_pipe), held)
    assert first.wait(TIMEOUT_S)
    waiting = Heard()
    ticket = scheduler.submit(work(toy_pipe, num_images_per_prompt=2), waiting)
    assert ticket.position == 1
    with pytest.raises(QueueFullError, match="try again in"):
        scheduler.submit(work(toy_pipe), Heard())
    with pytest.raises(FoveateError, match="may have 2 images, got 3"):
        scheduler.submit(work(toy_pipe, num_images_per_prompt=3), Heard())
    gate.set()
    waiting.wait()
    assert ticket.position == 0
    assert scheduler.stats().images_per_s is not None


def test_a_late_request_gets_its_coarse_image(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    """It is that of the run that skips the scales behind; a request that asks for an error gets one."""
    scheduler = start()
    flops = toy_flops(scheduler, toy_pipe)
    # From the sixth scale on, one takes an hour.
    scheduler.rates.ms = lambda number: 3.6e6 if number >= flops[5] else 0.0  # type: ignore[method-assign]
    coarse, refused = Heard(), Heard()
    scheduler.submit(work(toy_pipe, extra={"budget_ms": 30e3}), coarse)
    scheduler.submit(work(toy_pipe, extra={"budget_ms": 30e3, "on_late": "error"}), refused)
    (done,) = coarse.wait().of(ImageDone)
    assert done.is_coarse
    assert done.scales == 5
    assert "deadline_cut" in [warning.code for warning in done.output.report.warnings]
    spec = done.output.config["policy"]["spec"]
    assert spec == "full|skip-scales:count=2"
    assert equal(coarse.images, alone(toy_pipe, policy=spec))
    assert isinstance(refused.wait().error, LateError)


def test_a_request_that_waited_too_long_is_not_begun(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler, late = start(), Heard()
    scheduler.submit(work(toy_pipe, extra={"budget_ms": 1e-6}), late)
    assert isinstance(late.wait().error, LateError)
    assert not late.of(Started)


def test_an_error_of_the_loop_begins_its_images_again(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, advance, turns = start(), toy_pipe.runner.advance, []

    def break_once(self: object, calls: list[OpenCall], *, decodes: bool = False) -> Any:
        turns.append(len(calls))
        if len(turns) == 4:
            raise RuntimeError("a fault of ours")
        return advance(calls, decodes=decodes)

    monkeypatch.setattr(type(toy_pipe.runner), "advance", break_once)
    heard = Heard()
    scheduler.submit(work(toy_pipe, num_images_per_prompt=2, extra={"partials": 3}), heard)
    heard.wait()
    monkeypatch.undo()
    assert equal(heard.images, alone(toy_pipe, num_images_per_prompt=2))
    assert [event.scale for event in heard.of(ScaleDone) if event.index == 0] == list(range(LAST + 1))
    assert len(heard.of(Started)) == 2
    assert scheduler.stats().restarts == 1


def test_an_error_that_stays_is_the_answer_and_the_next_request_works(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start()

    def broken(self: object, calls: list[OpenCall], *, decodes: bool = False) -> Any:
        raise RuntimeError("a fault that stays")

    monkeypatch.setattr(type(toy_pipe.runner), "advance", broken)
    heard = Heard()
    scheduler.submit(work(toy_pipe), heard)
    assert "stays" in str(heard.wait().error)
    monkeypatch.undo()
    again = Heard()
    scheduler.submit(work(toy_pipe), again)
    assert equal(again.wait().images, alone(toy_pipe))


def test_one_poisoned_image_does_not_end_its_neighbours(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that escapes is that of no image; whose it is shows when they run by themselves."""
    scheduler, advance = start(), toy_pipe.runner.advance

    def poisoned(self: object, calls: list[OpenCall], *, decodes: bool = False) -> Any:
        if any(call.job.seeds == (13,) and call.next_scale == 3 for call in calls):
            raise RuntimeError("a poison")
        return advance(calls, decodes=decodes)

    monkeypatch.setattr(type(toy_pipe.runner), "advance", poisoned)
    bad, good = Heard(), [Heard() for _ in range(3)]
    for seed, heard in enumerate(good):
        scheduler.submit(work(toy_pipe, seed=seed), heard)
    scheduler.submit(work(toy_pipe, seed=13), bad)
    assert "poison" in str(bad.wait().error)
    images = [heard.wait().images for heard in good]
    monkeypatch.undo()
    assert all(equal(found, alone(toy_pipe, seed=seed)) for seed, found in enumerate(images))


def test_no_image_starves_behind_deadlines(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    """Somebody sends one request with a deadline behind the other; the image without one still runs in time."""
    scheduler = start(max_images=2)
    scheduler.rates.is_small = lambda number: False  # type: ignore[method-assign]
    scheduler.rates.fit = lambda points=None: None  # type: ignore[method-assign]
    scheduler.rates.fixed_ms, scheduler.rates.ms_per_gflop = 0.0, 1.0
    vips: list[float] = []
    plain = Heard()

    def again(event: Event) -> None:
        if isinstance(event, Finished) and len(vips) < 40 and not plain.of(Finished):
            vips.append(event.total_ms)
            scheduler.submit(work(toy_pipe, key="vip", extra={"budget_ms": 1e9}), Heard(again))

    scheduler.submit(work(toy_pipe, key="vip", extra={"budget_ms": 1e9}), Heard(again))
    scheduler.submit(work(toy_pipe), plain)
    plain.wait()
    assert len(vips) < 5


def test_a_scheduler_that_ends_answers_and_refuses(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, heard = start(), Heard()
    monkeypatch.setattr(scheduler, "_busy_turns", lambda: 1 / 0)
    scheduler.submit(work(toy_pipe), heard)
    assert isinstance(heard.wait().error, ClosingError)
    scheduler._thread.join(TIMEOUT_S)
    with pytest.raises(ClosingError):
        scheduler.submit(work(toy_pipe), Heard())
    assert not scheduler.close(1.0)


def test_an_error_while_one_image_commits_is_its_own(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other image of the batch has gone on, and is not run again."""
    scheduler, commit = start(), ScaleRun.commit

    def fail(run: ScaleRun) -> None:
        if run.state.request.sampler.seed_of(0) == 13 and run.scale.index == 3:
            raise MemoryError("no room for the commit")
        commit(run)

    monkeypatch.setattr(ScaleRun, "commit", fail)
    good, bad = Heard(), Heard()
    scheduler.submit(work(toy_pipe), good)
    scheduler.submit(work(toy_pipe, seed=13), bad)
    assert isinstance(bad.wait().error, MemoryError)
    assert equal(good.wait().images, alone(toy_pipe))
    assert [event.scale for event in good.of(ScaleDone)] == list(range(LAST + 1))


def test_memory_bounds_what_runs_at_once(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler, heard = start(), Heard()
    need = scheduler._room.need(toy_pipe.job("a cat", {"seed": 1}))
    scheduler._room.budget = 2 * need + need // 2
    scheduler.submit(work(toy_pipe, num_images_per_prompt=5), heard)
    heard.wait()
    assert max(event.company for event in heard.of(ScaleDone)) == 2
    assert len(heard.images) == 5
    scheduler._room.budget = need - 1
    with pytest.raises(FoveateError, match="choose a smaller size"):
        scheduler.submit(work(toy_pipe), Heard())


def test_closing_answers_everything_that_was_accepted(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler = start(max_images=1)
    heard = [Heard() for _ in range(3)]
    for each in heard:
        scheduler.submit(work(toy_pipe), each)
    assert scheduler.close(TIMEOUT_S)
    assert all(each.of(Finished) for each in heard)
    with pytest.raises(ClosingError):
        scheduler.submit(work(toy_pipe), Heard())


def test_what_the_grace_does_not_reach_is_told(toy_pipe: Pipeline, start: Callable[..., Scheduler]) -> None:
    scheduler, begun = start(max_images=1), threading.Event()
    heard = [Heard(lambda event: begun.set()), Heard()]
    for each in heard:
        scheduler.submit(work(toy_pipe, num_images_per_prompt=8), each)
    assert begun.wait(TIMEOUT_S)
    assert not scheduler.close(0.0)
    assert all(isinstance(each.wait().error, ClosingError) for each in heard)


def test_prompts_of_one_request_are_encoded_once(
    toy_pipe: Pipeline, start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = type(toy_pipe.runner).encode, []

    def note(self: Any, job: Any) -> Any:
        encoded.append(job.prompts)
        return encode(self, job)

    monkeypatch.setattr(type(toy_pipe.runner), "encode", note)
    heard = Heard()
    start().submit(work(toy_pipe, num_images_per_prompt=3), heard)
    heard.wait()
    assert encoded == [("a red cat",)]


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"rng": "reference"}, {}, "cannot be packed"),
        ({"output_type": "pt"}, {}, "images come as PIL"),
        ({}, {"partials": 4}, "partial images must be 0 to 3"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    toy_pipe: Pipeline, options: dict[str, Any], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(FoveateError, match=message):
        work(toy_pipe, extra=extra, **options)
