"""Load on a server over HTTP: requests that arrive by themselves, or clients that ask again once they are answered.

Open loop: arrivals are a Poisson process from a seed, and each is timed from when it was due, also where the generator
was late, so that a slow server cannot slow its own load down. Closed loop: N clients, each with one request at a time.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np

from foveate.bench.load_client import Answer, ask
from foveate.bench.load_server import Sample, sampled

NOT_SENT = -1
"""The status of a request that was due while too many others were open."""

_MOST_OPEN = 900
"""Requests open at once: a server takes 1000 connections unless told otherwise."""

_SETTLE = 0.1
"""Share of a phase at its start that is not counted: queues fill and caches warm up."""

_RETRY_S = 0.2
"""How long a client of a closed loop waits behind a refusal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """What is asked: call i has the next prompt, policy and size, and seeds of its own.

    Attributes:
        prompts: Taken in turn, as the next two are.
        policies: None is the server's default.
        sizes: As WIDTHxHEIGHT; None is the model's own.
        seed: Of the first call.
        images: Of one call.
        partials: Partial images of each.
    """

    prompts: tuple[str, ...]
    policies: tuple[str | None, ...] = (None,)
    sizes: tuple[str | None, ...] = (None,)
    seed: int = 0
    images: int = 1
    partials: int = 1

    def body(self, index: int) -> dict[str, Any]:
        """The body of a call."""
        named = {"policy": _turn(self.policies, index), "size": _turn(self.sizes, index)}
        return {
            "prompt": _turn(self.prompts, index),
            "n": self.images,
            "seed": self.seed + index * self.images,
            "stream": True,
            "partial_images": self.partials,
            **{name: value for name, value in named.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of load; either `rate` (open loop, requests per second) or `concurrency` (closed loop) is set.

    It ends after `seconds`, or with its `count`-th request.
    """

    seconds: float
    count: int
    rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.concurrency} at a time" if self.rate is None else f"{self.rate:.3g} requests/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """One request: when it was due, sent, had its first partial image and was answered, in seconds of its phase."""

    due_s: float
    sent_s: float
    first_s: float | None
    done_s: float
    status: int
    images: int
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRun:
    """What a phase was like.

    Attributes:
        phase: What was asked for.
        shots: All requests, in the order of their answers.
        samples: What the server said of itself meanwhile.
        end_s: When the phase ended, before what was still open then was answered.
        client_cpu_share: Of one core, that the load generator took.
    """

    phase: Phase
    shots: tuple[Shot, ...]
    samples: tuple[Sample, ...]
    end_s: float
    client_cpu_share: float

    @property
    def settled_s(self) -> float:
        """From when on requests count."""
        return _SETTLE * self.end_s


def arrivals(phase: Phase) -> Iterator[float]:
    """The seconds at which requests of an open loop are due."""
    assert phase.rate is not None, "it is an open loop"
    draws, due = np.random.default_rng(phase.seed), 0.0
    for _ in range(phase.count):
        due += float(draws.exponential(1 / phase.rate))
        if due >= phase.seconds:
            return
        yield due


async def run_phase(client: httpx2.AsyncClient, phase: Phase, calls: Calls, first: int) -> PhaseRun:
    """Puts one phase of load on a server and waits for every answer.

    Args:
        client: Knows the server's address and key.
        phase: How much.
        calls: What is asked.
        first: Index of the first call.
    """
    run = _Run(client=client, calls=calls, first=first)
    sampling = asyncio.create_task(sampled(client, run.now))
    try:
        end_s = await (_open(run, phase) if phase.concurrency is None else _closed(run, phase))
    finally:
        sampling.cancel()
        samples = (await asyncio.gather(sampling, return_exceptions=True))[0]
    return PhaseRun(
        phase=phase,
        shots=tuple(run.shots),
        samples=() if isinstance(samples, BaseException) else tuple(samples),
        end_s=end_s,
        client_cpu_share=(time.process_time() - run.cpu_s) / run.now(),
    )


class _Run:
    """The clock and the answers of a phase."""

    def __init__(self, *, client: httpx2.AsyncClient, calls: Calls, first: int) -> None:
        self.client, self.calls, self.first = client, calls, first
        self.shots: list[Shot] = []
        self.began, self.cpu_s = time.perf_counter(), time.process_time()

    def now(self) -> float:
        return time.perf_counter() - self.began

    async def shoot(self, index: int, due_s: float) -> int:
        """One request; its status."""
        sent_s = self.now()
        answer = await ask(self.client, self.calls.body(self.first + index), self.now)
        self.note(due_s, sent_s, answer)
        return answer.status

    def note(self, due_s: float, sent_s: float, answer: Answer) -> None:
        shot = Shot(
            due_s=due_s,
            sent_s=sent_s,
            first_s=answer.first_s,
            done_s=self.now(),
            status=answer.status,
            images=answer.images,
            error=answer.error,
        )
        self.shots.append(shot)


async def _open(run: _Run, phase: Phase) -> float:
    """Sends each request when it is due, whatever became of the earlier ones; when it ended."""
    sent: list[asyncio.Task[int]] = []
    open_now: set[asyncio.Task[int]] = set()
    num_sent = 0
    try:
        for index, due_s in enumerate(arrivals(phase)):
            await asyncio.sleep(max(0.0, due_s - run.now()))
            num_sent += 1
            if len(open_now) >= _MOST_OPEN:
                run.note(due_s, run.now(), Answer(status=NOT_SENT, error="too many open"))
                continue
            task = asyncio.create_task(run.shoot(index, due_s))
            sent.append(task)
            open_now.add(task)
            task.add_done_callback(open_now.discard)
        is_over = num_sent < phase.count
        if is_over:
            await asyncio.sleep(max(0.0, phase.seconds - run.now()))
        # Also those that are done, as one of them may have raised.
        await asyncio.gather(*sent)
    finally:
        for task in open_now:
            task.cancel()
    return phase.seconds if is_over else _last(run.shots)


async def _closed(run: _Run, phase: Phase) -> float:
    """Each client asks again once it is answered; when the phase ended."""
    indices = iter(range(phase.count))

    async def client() -> None:
        for index in indices:
            if run.now() >= phase.seconds:
                return
            if await run.shoot(index, run.now()) != _OK:
                await asyncio.sleep(_RETRY_S)

    assert phase.concurrency is not None, "it is a closed loop"
    async with asyncio.TaskGroup() as group:
        for _ in range(phase.concurrency):
            group.create_task(client())
    return min(phase.seconds, _last(run.shots))


_OK = 200


def _last(shots: Sequence[Shot]) -> float:
    """When the last answer came."""
    return max((shot.done_s for shot in shots), default=0.0)


def _turn(values: Sequence[Any], index: int) -> Any:  # noqa: ANN401 - one of what it is given
    return values[index % len(values)]
