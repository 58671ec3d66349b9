"""Output shards on Ray Data: workers are actors that hold a pipeline; numbers of shards go in, summaries come out.

Images and rows never pass through Ray: a worker reads its rows from the input and publishes its shard into the output
folder, which all machines must see. So a worker that dies costs the batch that it was at: its shard goes on from its
journals in another process.
"""

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from foveate.core.cluster import check_room, own_cpus, ray_cluster
from foveate.core.errors import FoveateError

logger = logging.getLogger("foveate")

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)

_AT_ONCE = 2000
"""Shards of one data set of Ray, which holds an object for each; workers are made anew for the next ones."""

_LEVELS = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""What Ray Data may log; the second one warns that its progress bars are off, as was asked for."""

_BROKEN, _LOST, _DONE = "broken", "lost", "done"


@runtime_checkable
class ShardWorker(Protocol[S_co]):
    """What generates whole shards."""

    def generate(self, shard: int) -> S_co:
        """Generates everything of a shard that is not there yet, publishes it, and says what is in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RayWorkers:
    """How many workers there are, and what each has.

    Attributes:
        address: Of a Ray cluster; None starts one of this machine.
        count: Workers.
        cpus: Of a worker; None divides this machine's among them, or is one on a cluster.
        gpus: Of a worker; shares are possible.
        attempts: How often a shard is begun before it is given up.
        most_lost: Shards that may be given up before the run stops.
    """

    address: str | None = None
    count: int = 1
    cpus: float | None = None
    gpus: float = 0.0
    attempts: int = 3
    most_lost: int = 10

    def __post_init__(self) -> None:
        """Refuses what could do nothing."""
        if self.count < 1:
            raise FoveateError(f"workers must be 1 or more, got {self.count}")
        if self.gpus < 0 or (self.cpus is not None and self.cpus <= 0):
            raise FoveateError(f"a worker needs CPUs above 0 and GPUs of 0 or more, got {self.cpus} and {self.gpus:g}")
        if self.attempts < 1 or self.most_lost < 1:
            raise FoveateError(f"attempts and lost shards must be 1 or more, got {self.attempts} and {self.most_lost}")

    @property
    def cpus_each(self) -> float:
        """CPUs of a worker: as asked, or its share of this machine's."""
        if self.cpus is not None:
            return self.cpus
        return 1.0 if self.address is not None else float(max(1, own_cpus() // self.count))


def generate_on_ray(
    make: Callable[[], ShardWorker[S]], shards: Sequence[int], workers: RayWorkers
) -> Iterator[tuple[int, S]]:
    """Has shards generated, and says what came of each, in the order in which they end.

    A shard is said once, whatever died on the way. One whose worker raises is begun again, by a worker that is made
    anew; one whose process dies is begun again in another. Both end after so many attempts.

    Args:
        make: Makes a worker; called in the process of each. It is pickled, so it holds settings and no model.
        shards: Their numbers.
        workers: How many workers there are.

    Raises:
        FoveateError: A worker cannot be made; or, behind the last shard or when too many are lost, which shards were
            given up and why. What was published stays, and the same call goes on with the rest.
    """
    started = max(own_cpus(), math.ceil(workers.count * workers.cpus_each))
    with ray_cluster(address=workers.address, num_cpus=started) as ray:
        count, cpus, gpus = workers.count, workers.cpus_each, workers.gpus
        check_room(ray, workers.address, "workers", count=count, cpus=cpus, gpus=gpus)
        # In a process of its own, so that it outlives workers; it takes no CPU from them.
        begun = ray.remote(num_cpus=0)(_Begun).remote()
        run: _Run[S] = _Run(make, workers, begun)
        with _quiet_data():
            for first in range(0, len(shards), _AT_ONCE):
                yield from run.results(shards[first : first + _AT_ONCE])
        run.end()


class _Run(Generic[S]):
    """One call: what was given up so far."""

    def __init__(self, make: Callable[[], ShardWorker[S]], workers: RayWorkers, begun: Any) -> None:  # noqa: ANN401
        self._make, self._workers, self._begun = make, workers, begun
        self._lost: dict[int, str] = {}

    def results(self, shards: Sequence[int]) -> Iterator[tuple[int, S]]:
        """Those of one data set of Ray."""
        for row in self._rows(shards):
            shard, kind = int(row["shard"]), str(row["kind"])
            content = pickle.loads(row["content"])
            if kind == _DONE:
                yield shard, content
            elif kind == _BROKEN:
                raise FoveateError(f"no worker can be made: {content}")
            else:
                self._give_up(shard, content)

    def end(self) -> None:
        """Says what was given up.

        Raises:
            FoveateError: Anything was.
        """
        if self._lost:
            shard, reason = next(iter(self._lost.items()))
            shards = "shard" if len(self._lost) == 1 else "shards"
            raise FoveateError(
                f"{len(self._lost)} {shards} given up after {self._workers.attempts} attempts each, shard {shard}: "
                f"{reason}; start the same command again for what is left"
            )

    def _give_up(self, shard: int, reason: str) -> None:
        self._lost[shard] = reason
        logger.error("shard %d is given up: %s", shard, reason)
        if len(self._lost) >= self._workers.most_lost:
            self.end()

    def _rows(self, shards: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """What workers say, as it comes; one block is one shard, so that a dead worker repeats one.

        Raises:
            FoveateError: Ray itself failed.
        """
        from ray.data import ActorPoolStrategy, from_items  # noqa: PLC0415 - an extra, and slow to import
        from ray.exceptions import RayError  # noqa: PLC0415

        workers = self._workers
        count = min(workers.count, len(shards))
        numbers = from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        said = numbers.map_batches(
            _Actor,
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(self._make, self._begun, workers.attempts),
            num_cpus=workers.cpus_each,
            num_gpus=workers.gpus,
        )
        try:
            yield from said.iter_rows()
        except RayError as error:
            raise FoveateError(f"Ray ended the run: {_said(error)[:500]}; start the same command again") from error


class _Begun:
    """How often each shard was begun, whatever became of the process that did."""

    def __init__(self) -> None:
        self._attempts: dict[int, int] = {}

    def begin(self, shard: int) -> int:
        """Notes another attempt; how many there are with it."""
        self._attempts[shard] = self._attempts.get(shard, 0) + 1
        return self._attempts[shard]


class _Actor(Generic[S]):
    """A worker in a process of Ray."""

    def __init__(self, make: Callable[[], ShardWorker[S]], begun: Any, attempts: int) -> None:  # noqa: ANN401
        self._make, self._begun, self._attempts = make, begun, attempts
        self._worker: ShardWorker[S] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """What comes of the shard of a batch: a summary, or why there is none."""
        shard = int(batch["shard"][0])
        kind, content = self._attempt(shard)
        return {"shard": [shard], "kind": [kind], "content": [pickle.dumps(content)]}

    def _attempt(self, shard: int) -> tuple[str, Any]:
        import ray  # noqa: PLC0415

        reason = "the process of its worker died each time"
        while ray.get(self._begun.begin.remote(shard)) <= self._attempts:
            try:
                worker = self._worker = self._worker or self._make()
            except Exception as error:  # said where the run ends
                logger.exception("no worker can be made")
                return _BROKEN, _said(error)
            try:
                return _DONE, worker.generate(shard)
            except Exception as error:  # a row's failure is in the summary; this is one of the worker
                logger.exception("shard %d failed", shard)
                # What it holds may be broken, so the next attempt has another one.
                reason, self._worker = _said(error), None
        return _LOST, reason


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data without progress bars and reports of its own; undone at the end."""
    from ray.data import DataContext  # noqa: PLC0415

    context = DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start")
    before = {name: getattr(context, name) for name in names}
    logs = {name: logging.getLogger(name) for name in _LEVELS}
    levels = {name: log.level for name, log in logs.items()}
    for name in names:
        setattr(context, name, False)
    for name, log in logs.items():
        log.setLevel(_LEVELS[name])
    try:
        yield
    finally:
        for name, log in logs.items():
            log.setLevel(levels[name])
        for name, value in before.items():
            setattr(context, name, value)


def _said(error: Exception) -> str:
    """An error in one line, with its type where it is none of ours."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, FoveateError) else f"{type(error).__name__}: {text}"
