"""Shards on Ray Data with a toy worker: all of them come once, whatever dies or raises on the way."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import FoveateError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray"),
    # Ray's own warnings are not ours.
    pytest.mark.filterwarnings("ignore"),
]

TIMEOUT_S = 60.0


def toy(folder: Path, *, seconds: float = 0.1, fails: tuple[int, ...] = (), once: tuple[int, ...] = (),
        dies: tuple[int, ...] = ()) -> Callable[[], Any]:  # fmt: skip
    """Makes workers that write what they begin into a folder; without names of this module, which others cannot import.

    They raise at the shards that fail, at those of `once` only the first time, and end their process at those that die.
    """

    class Toy:
        def generate(self, shard: int) -> dict[str, int]:
            with (folder / f"{shard}.begun").open("a", encoding="ascii") as begun:
                begun.write(f"{os.getpid()}\n")
            time.sleep(seconds)
            attempts = len((folder / f"{shard}.begun").read_text(encoding="ascii").split())
            if shard in dies:
                os._exit(1)
            if shard in fails or (shard in once and attempts == 1):
                raise ValueError(f"no luck with {shard}\nand more")
            return {"shard": shard, "process": os.getpid(), "attempts": attempts}

    return Toy


def run(make: Callable[[], Any], shards: list[int], *, count: int = 2, **settings: Any) -> Iterator[tuple[int, Any]]:
    """As `generate_on_ray`; Ray is imported only where it runs, as that takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from foveate.bulk.ray_engine import RayWorkers, generate_on_ray  # noqa: PLC0415

        yield from generate_on_ray(make, shards, RayWorkers(count=count, cpus=0.5, **settings))


def processes() -> set[int]:
    """Of workers and actors of Ray on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::"):
                found.add(int(folder.name))
    return found


def all_gone(before: set[int]) -> None:
    """Waits until no process of Ray is left that was not there before."""
    until = time.monotonic() + TIMEOUT_S
    while processes() - before:
        assert time.monotonic() < until, "processes of Ray stay"
        time.sleep(0.1)


def kill_one(folder: Path, after: int) -> list[int]:
    """Kills the process that began a shard last, once so many have begun; whom, comes into the list."""
    killed: list[int] = []

    def watch() -> None:
        until = time.monotonic() + 4 * TIMEOUT_S
        while time.monotonic() < until and not killed:
            begun = sorted(folder.glob("*.begun"), key=lambda path: path.stat().st_mtime)
            if len(begun) >= after and (words := begun[-1].read_text(encoding="ascii").split()):
                os.kill(int(words[-1]), signal.SIGKILL)
                killed.append(int(words[-1]))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    return killed


def test_one_of_two_workers_is_killed_and_another_shard_fails_at_first(tmp_path: Path) -> None:
    shards, before = list(range(100, 112)), processes()
    killed = kill_one(tmp_path, after=4)
    found = list(run(toy(tmp_path, seconds=0.5, once=(110,)), shards))
    assert sorted(shard for shard, _ in found) == shards, "each is said once"
    assert all(summary["shard"] == shard for shard, summary in found)
    assert len(killed) == 1
    repeated = [shard for shard, summary in found if summary["attempts"] > 1]
    assert 110 in repeated
    assert len(repeated) == 2, "the one that failed, and the one that its worker died of"
    assert killed[0] not in {summary["process"] for shard, summary in found if shard in repeated and shard != 110}
    assert len({summary["process"] for _, summary in found} | set(killed)) >= 3, "another process took its place"
    all_gone(before)


@pytest.mark.soak
def test_what_is_given_up_is_said_behind_the_others(tmp_path: Path) -> None:
    found: list[tuple[int, Any]] = []
    with pytest.raises(FoveateError) as refused:
        found.extend(run(toy(tmp_path, fails=(3,), dies=(5,)), list(range(8)), attempts=2))
    assert sorted(shard for shard, _ in found) == [0, 1, 2, 4, 6, 7]
    message = str(refused.value)
    assert "2 shards given up after 2 attempts each, shard 3: ValueError: no luck with 3 and more" in message
    assert "start the same command again" in message
    assert [len((tmp_path / f"{shard}.begun").read_text().split()) for shard in (3, 5)] == [2, 2]


@pytest.mark.soak
def test_a_run_in_which_everything_fails_stops(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="3 shards given up after 1 attempts each"):
        list(run(toy(tmp_path, seconds=0, fails=tuple(range(50))), list(range(50)), attempts=1, most_lost=3))
    assert len(list(tmp_path.glob("*.begun"))) < 20


@pytest.mark.soak
def test_a_worker_that_cannot_be_made_ends_the_run() -> None:
    def make() -> Any:
        raise FoveateError("no model 'x'")

    with pytest.raises(FoveateError, match="no worker can be made: no model 'x'"):
        list(run(make, [1, 2]))


def test_numbers_that_cannot_be_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from foveate.bulk.ray_engine import RayWorkers  # noqa: PLC0415
    with pytest.raises(FoveateError, match="workers must be 1 or more, got 0"):
        RayWorkers(count=0)
    with pytest.raises(FoveateError, match="GPUs of 0 or more"):
        RayWorkers(gpus=-1.0)


_PROGRAM = """
import sys
from pathlib import Path
from tests.bulk.test_ray_engine import run, toy
try:
    for shard, _ in run(toy(Path(sys.argv[1]), seconds=0.5), list(range(1000))):
        print(shard, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.soak
def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    before = processes()
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as program:
        try:
            assert program.stdout is not None
            first = [program.stdout.readline() for _ in range(3)]
            assert all(first), "it runs"
            began = time.monotonic()
            # As a terminal does: to all of them.
            os.killpg(program.pid, signal.SIGINT)
            assert program.wait(TIMEOUT_S) == 130
            assert time.monotonic() - began < 15
        finally:
            program.kill()
    all_gone(before)
