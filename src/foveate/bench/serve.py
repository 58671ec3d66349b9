"""Load on a server in turns: closed loops first, then open ones; what they were like beside each other."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from foveate.bench.load import Calls, Phase, PhaseRun, run_phase
from foveate.bench.load_client import ask
from foveate.bench.load_report import LoadReport, summary
from foveate.bench.load_server import told
from foveate.bench.machine import describe_machine
from foveate.bench.rounds import Stop
from foveate.core.errors import FoveateError

_CAPACITY_S = 60.0
"""A closed loop that only measures what the server can do takes no longer."""

_OK = 200
_CONNECT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What load a server gets.

    Attributes:
        calls: What is asked.
        concurrency: Closed loops, by their clients.
        rate: An open loop of so many requests per second; None for none.
        load: An open loop of so many times what the first closed loop completes; None for none.
        seconds: Of each phase; of a closed loop in front of `load` at most 60.
        count: Requests of a phase at most.
        runs: Rounds; in each one every side has its turn.
        warmup: Requests in front of the first round, one after the other, for each policy and size.
        goal_ms: What takes longer is no goodput.
        timeout_s: Of one read of a request.
        command: What a reader runs to measure the same.
    """

    calls: Calls
    concurrency: tuple[int, ...]
    rate: float | None
    load: float | None
    seconds: float
    count: int
    runs: int
    warmup: int
    goal_ms: float | None
    timeout_s: float
    command: str

    @property
    def num_sides(self) -> int:
        """Kinds of load."""
        return len(self.concurrency) + (self.rate is not None) + (self.load is not None)


def run_load(url: str, key: str | None, plan: LoadPlan, said: Callable[[str], object] = lambda _: None) -> LoadReport:
    """Puts load on a server, side by side and round by round; Ctrl-C leaves what was complete.

    Args:
        url: Of the server, without a path.
        key: API key, if it wants one.
        plan: How much.
        said: Hears what is measured next.

    Raises:
        FoveateError: The server does not answer the first request with images.
    """
    rounds: list[list[PhaseRun]] = []
    stopped = None
    try:
        asyncio.run(_measure(url, key, plan, rounds, said))
    except KeyboardInterrupt:
        stopped = Stop.INTERRUPTED
    sides = zip(*(measured for measured in rounds if len(measured) == plan.num_sides), strict=True)
    return LoadReport(
        sides=tuple(sides), goal_ms=plan.goal_ms, images=plan.calls.images, facts=_facts(url, plan), stopped=stopped
    )


async def _measure(
    url: str, key: str | None, plan: LoadPlan, rounds: list[list[PhaseRun]], said: Callable[[str], object]
) -> None:
    """Appends every phase to the list of its round."""
    timeout = httpx2.Timeout(plan.timeout_s, connect=_CONNECT_S)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, timeout=timeout, limits=limits, headers=headers) as client:
        said("warm-up")
        await _warm_up(client, plan)
        first = 0
        for index in range(plan.runs):
            rounds.append([])
            for side in range(plan.num_sides):
                phase = replace(_phase(plan, side, rounds[-1]), seed=plan.calls.seed + index)
                said(f"round {index + 1} of {plan.runs}: {phase.name}")
                rounds[-1].append(await run_phase(client, phase, plan.calls, first))
                first += plan.count


async def _warm_up(client: httpx2.AsyncClient, plan: LoadPlan) -> None:
    """One request after the other; the first refusal ends the measurement."""
    calls = plan.calls
    kinds = max(len(calls.policies), len(calls.sizes)) if plan.warmup else 1
    for index in range(max(plan.warmup, 1) * kinds):
        answer = await ask(client, calls.body(index), lambda: 0.0)
        if answer.status != _OK or answer.error is not None:
            raise FoveateError(
                f"{client.base_url} answers {answer.status} {answer.error or ''} where images were asked for; "
                "is it a foveate server, and does it take the prompt, the policy and the key?"
            )


def _phase(plan: LoadPlan, side: int, before: Sequence[PhaseRun]) -> Phase:
    """A side's phase; `before` are those of this round so far."""
    if side < len(plan.concurrency):
        seconds = plan.seconds if plan.load is None else min(plan.seconds, _CAPACITY_S)
        return Phase(seconds=seconds, count=plan.count, concurrency=plan.concurrency[side])
    rate = plan.rate if plan.rate is not None and side == len(plan.concurrency) else None
    if rate is None:
        assert plan.load is not None, "there is no other side"
        capacity = summary(before[0], None)["images_per_s"] / plan.calls.images
        if not capacity:
            raise FoveateError("--load needs a closed loop that completes images; give it more --seconds")
        rate = plan.load * capacity
    return Phase(seconds=plan.seconds, count=plan.count, rate=rate)


def _facts(url: str, plan: LoadPlan) -> dict[str, Any]:
    """What was measured, on what, and how."""
    calls = plan.calls
    return {
        "kind": "serve",
        "command": plan.command,
        "machine": describe_machine(),
        "server": {"version": told(url, "/version"), "ready": told(url, "/ready")},
        "settings": {
            "prompts": len(calls.prompts),
            "policies": list(calls.policies),
            "sizes": list(calls.sizes),
            "seed": calls.seed,
            "images": calls.images,
            "partials": calls.partials,
            "concurrency": list(plan.concurrency),
            "rate": plan.rate,
            "load": plan.load,
            "seconds": plan.seconds,
            "count": plan.count,
            "runs": plan.runs,
            "warmup": plan.warmup,
            "goal_ms": plan.goal_ms,
            "timeout_s": plan.timeout_s,
        },
        "method": [
            "requests stream their images; a time begins when a request was due, also where an open loop sent it later",
            "what was due in the first tenth of a phase counts for nothing but the numbers of requests",
            "images per second are those completed between that and the end of the phase",
            "the load generator and, unless --url names another machine, the server share the processors",
        ],
    }
