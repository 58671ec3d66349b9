"""The store that several processes share: what one keeps the others find, within the bounds of all."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.server.shared_store import SharedStore
from foveate.server.store import Store, StoreFullError, StoreSettings
from tests.server.test_keys import Clock
from tests.server.test_store import HOLDER


def pair(tmp_path: Path, clock: Clock, **settings: float) -> tuple[SharedStore, SharedStore]:
    """The store of the front, and that of a replica."""
    given = StoreSettings(folder=tmp_path / "kept", **settings)
    first = SharedStore.make(given, clock)
    return first, SharedStore(first.folder, given, clock=clock)


def test_what_one_keeps_the_other_finds_for_its_owner(tmp_path: Path) -> None:
    front, replica = pair(tmp_path, Clock())
    assert isinstance(front, Store)
    assert replica.put("a", "x", b"one", "image/png")
    assert replica.put("b", "x", b"two", "image/webp")
    assert front.get("a", "x") == (b"one", "image/png")
    assert front.get("b", "x") == (b"two", "image/webp")
    assert (front.get("a", "y"), front.holds("a", "x"), front.holds("a", "y")) == (None, True, False)
    assert not front.put("a", "x", b"three", "image/jpeg")
    assert (front.get("a", "x"), front.held) == ((b"one", "image/png"), (2, 6))
    assert front.folder.stat().st_mode & 0o777 == 0o700
    assert not any(name in "".join(os.listdir(front.folder)) for name in ("a", "x") if len(name) > 1)
    replica.close()
    assert front.holds("a", "x")
    front.close()
    assert not front.folder.exists()


def test_the_bounds_hold_for_all_together(tmp_path: Path) -> None:
    clock = Clock()
    front, replica = pair(tmp_path, clock, images=3, bytes=10, seconds=60.0)
    for number, name in enumerate("abcd"):
        (front, replica)[number % 2].put("o", name, b"xx", "image/png")
        clock.now += 0.01
    assert [name for name in "abcd" if front.get("o", name)] == ["b", "c", "d"]
    replica.put("o", "e", b"x" * 7, "image/png")
    assert [name for name in "abcde" if front.get("o", name)] == ["d", "e"]
    with pytest.raises(StoreFullError, match="11 bytes"):
        front.put("o", "f", b"x" * 11, "image/png")
    clock.now += 61
    assert (front.get("o", "e"), front.holds("o", "e"), front.held) == (None, False, (0, 0))
    front.expire()
    assert [name for name in os.listdir(front.folder) if not name.startswith(".")] == []


def test_what_a_killed_writer_left_is_deleted(tmp_path: Path) -> None:
    front, _ = pair(tmp_path, Clock())
    real = SharedStore(front.folder, StoreSettings())
    (old, new) = (front.folder / f".{name}.part" for name in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    real.expire()
    assert (old.exists(), new.exists()) == (False, True)
    assert real.held == (0, 0)


def test_what_a_killed_server_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        holder.kill()
    assert left.is_dir()
    front = SharedStore.make(StoreSettings(folder=tmp_path))
    assert list(tmp_path.iterdir()) == [front.folder]
    SharedStore.make(StoreSettings(folder=tmp_path)).close()
    assert front.folder.is_dir(), "its process lives"


def test_a_full_disk_pushes_out_the_oldest_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    kept, _ = pair(tmp_path, clock)
    for name in "ab":
        kept.put("o", name, b"x", "image/png")
        clock.now += 1
    answers = iter([OSError(errno.ENOSPC, "No space left on device"), None])
    plain = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        error = next(answers, OSError(errno.ENOSPC, "No space left on device"))
        if error is not None:
            raise error
        return plain(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    assert kept.put("o", "c", b"x", "image/png")
    assert [name for name in "abc" if kept.holds("o", name)] == ["b", "c"]
    with pytest.raises(StoreFullError, match="No space left"):
        kept.put("o", "d", b"x", "image/png")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FoveateError, match="cannot keep images"):
        SharedStore.make(StoreSettings(folder=file))


def _write(folder: Path, start: int) -> None:
    store = SharedStore(folder, StoreSettings(images=10))
    for number in range(start, start + 20):
        store.put("o", str(number), bytes(1000), "image/png")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[Path, list[multiprocessing.Process]]]:
    context = multiprocessing.get_context("fork")
    found = [context.Process(target=_write, args=(tmp_path, 100 * k)) for k in range(3)]
    yield tmp_path, found
    for process in found:
        process.kill()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_that_write_at_once_keep_within_the_bounds(processes) -> None:
    folder, writers = processes
    for writer in writers:
        writer.start()
    most = 0
    reader = SharedStore(folder, StoreSettings(images=10))
    while any(writer.is_alive() for writer in writers):
        most = max(most, reader.held[0])
        time.sleep(0.005)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert reader.held[0] == 10
    assert most <= 10
    assert all(len(path.read_bytes()) == 1000 for path in folder.glob("*.png"))
