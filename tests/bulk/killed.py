"""A small run that tests kill: `every` at each call that touches a file, `run` from outside.

python -m tests.bulk.killed every FOLDER SHARDS ROWS
python -m tests.bulk.killed run FOLDER SHARDS ROWS
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from foveate.bulk.output import OutputFolder
from tests.bulk.bulk_items import a_failure, a_run, an_item, visible

_TOUCHING = {
    "open", "write", "writelines", "fsync", "replace", "rename", "unlink", "remove", "mkdir", "truncate", "close",
    "flock", "chmod", "link",
}  # fmt: skip


Size = tuple[int, int]
"""Shards and rows of a shard. Every row has an image, but the first of a shard, which fails."""


def generate(folder: Path, acknowledge: Callable[[int], None], size: Size) -> None:
    """Makes what is missing of the run, and tells of every row after `append` returned."""
    run = a_run(folder)
    num_shards, num_rows = size
    for number in range(num_shards):
        if number in run.published():
            continue
        with run.shard(number) as shard:
            for row in range(number * num_rows, (number + 1) * num_rows):
                failure = a_failure(row, 0)
                if (row, 0) not in shard.done:
                    shard.append([failure if row % num_rows == 0 else an_item(row)])
                    acknowledge(row)
            shard.publish()
    run.write_failed()


def rows_kept(folder: Path, num_shards: int) -> list[int]:
    """Rows that a run has, published or not, as a program that opens it sees them."""
    run = OutputFolder.read(folder)
    found = [entry["row"] for entry in run.entries()]
    for number in set(range(num_shards)) - run.published():
        with run.shard(number) as shard:
            found += [row for row, _ in shard.done]
    return found


def _killed_at(point: int, folder: Path, size: Size) -> tuple[list[int], bool]:
    """Runs until just before a call that touches a file; what was acknowledged, and whether it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def watch(_: FrameType, event: str, called: Any) -> None:
            nonlocal calls
            if event == "c_call" and called.__name__ in _TOUCHING:
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1

        sys.setprofile(watch)
        # A pipe keeps what was written to it when the writer is killed.
        generate(folder, lambda row: os.writev(writer, [bytes([row])]), size)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        rows = list(file.read())
    return rows, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_everywhere(base: Path, size: Size) -> int:
    """Kills a run at every call in turn and goes on; returns how many calls there are."""
    generate(base / "whole", lambda _: None, size)
    whole = visible(base / "whole")
    point, is_killed = 0, True
    while is_killed:
        folder = base / "killed"
        rows, is_killed = _killed_at(point, folder, size)
        if (folder / "run.json").is_file():
            seen = visible(folder)
            assert seen.items() <= whole.items(), f"half a file is visible after call {point}"
            kept = rows_kept(folder, size[0])
            assert len(kept) == len(set(kept)), f"an item is there twice after call {point}"
            assert set(rows) <= set(kept), f"an item is lost after call {point}"
        generate(folder, rows.append, size)
        # An item may be there that nobody was told of, never one that was told twice.
        assert len(rows) == len(set(rows)), f"an item was made twice after call {point}"
        assert len(rows) >= size[0] * size[1] - 1, f"more than one item was not told of after call {point}"
        assert visible(folder) == whole, f"another result after call {point}"
        left = {path.name for path in (folder / ".work").iterdir()} - {"run.lock", "failed.lock"}
        assert not left, f"{left} are left after call {point}"
        shutil.rmtree(folder)
        point += 1
    return point


def main(mode: str, folder: str, num_shards: str, num_rows: str) -> None:
    size = (int(num_shards), int(num_rows))
    if mode == "every":
        _tell(kill_everywhere(Path(folder), size))
        return
    _tell("ready")
    sys.stdin.readline()
    generate(Path(folder), _tell, size)
    _tell("done")


def _tell(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
