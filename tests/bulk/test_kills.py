"""A process that is killed anywhere loses nothing that it was told is kept, and another goes on."""

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bulk.bulk_items import a_failure, a_run, an_item, content_of, hidden, visible
from tests.bulk.killed import Size, generate, rows_kept
from tests.randomness import seed_of

SIZE = (3, 40)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where syncing takes no time."""
    place = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=place if place.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def start(mode: str, folder: Path, size: Size = SIZE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bulk.killed", mode, str(folder), *map(str, size)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("go\n")
    child.stdin.flush()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run of 40 rows a shard leaves."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    generate(folder, lambda _: None, SIZE)
    return visible(folder)


@pytest.mark.parametrize("size", [(1, 2), pytest.param((3, 4), marks=pytest.mark.soak)])
def test_a_kill_before_any_call_that_touches_a_file(memory: Path, size: Size) -> None:
    with start("every", memory, size) as child:
        out, _ = child.communicate()
    assert child.returncode == 0
    assert int(out) > 40 * size[0]


@pytest.mark.parametrize("num_kills", [4, pytest.param(60, marks=pytest.mark.soak)])
def test_kills_at_random_times(tmp_path: Path, whole: dict[str, bytes], num_kills: int) -> None:
    rng = random.Random(seed_of("kills"))
    folder, told = tmp_path / "out", list[int]()
    for kill in range(num_kills + 1):
        with start("run", folder) as child:
            go(child)
            if kill < num_kills:
                try:
                    child.wait(rng.expovariate(20))
                except subprocess.TimeoutExpired:
                    child.kill()
            lines = child.stdout.read().splitlines()
        told += [int(line) for line in lines if line != "done"]
        if (folder / "run.json").is_file():
            kept = rows_kept(folder, SIZE[0])
            assert len(kept) == len(set(kept))
            assert set(told) <= set(kept)
            assert visible(folder).items() <= whole.items()
        if "done" in lines:
            break
    assert lines[-1] == "done"
    assert len(told) == len(set(told)), "an item was made twice"
    assert visible(folder) == whole
    assert hidden(folder, "journal") == []


def test_two_workers_on_the_same_shards_at_once(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with start("run", tmp_path / "out") as one, start("run", tmp_path / "out") as other:
        go(one)
        go(other)
        ends = [child.communicate()[0].splitlines()[-1] for child in (one, other)]
    assert ends == ["done", "done"]
    assert visible(tmp_path / "out") == whole
    # A journal that one began while the other published is removed by the next run.
    a_run(tmp_path / "out")
    assert hidden(tmp_path / "out", "journal") == []


def test_a_worker_that_was_believed_dead_changes_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as late:
        late.append([an_item(0), a_failure(1, 0)])
        with run.shard(0) as shard:
            assert set(shard.done) == {(0, 0), (1, 0)}
            shard.append([an_item(1)])
            summary = shard.publish()
        seen = visible(tmp_path / "out")
        assert late.is_published
        late.append([a_failure(2, 0)])
        assert late.publish() == summary
        assert visible(tmp_path / "out") == seen
    with run.shard(0) as later:
        later.append([an_item(7)])
    assert len(hidden(tmp_path / "out", "journal")) == 1
    assert visible(tmp_path / "out") == seen
    assert [run.content(entry) for entry in run.entries()] == [content_of(0), content_of(1)]
    a_run(tmp_path / "out")
    assert hidden(tmp_path / "out", "journal") == []


def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    """A power cut cannot be had here, so the order of calls is looked at."""
    calls: list[str] = []

    def watch(_: object, event: str, called: object) -> None:
        name = getattr(called, "__name__", "")
        if event == "c_call" and name in ("fsync", "replace", "rename", "unlink"):
            calls.append(name)

    run = a_run(tmp_path / "out")
    before = sys.getprofile()
    with run.shard(0) as shard:
        sys.setprofile(watch)
        try:
            shard.append([an_item(0)])
            appended = list(calls)
            calls.clear()
            shard.publish()
        finally:
            sys.setprofile(before)
    assert appended == ["fsync", "fsync"], "the journal and the folder that has its name"
    moved = [name for name in calls if name != "unlink"]
    assert moved in (["fsync", name, "fsync"] * 2 for name in ("rename", "replace"))
    last = len(calls) - 1 - calls[::-1].index("fsync")
    assert "unlink" in calls[last:], "journals go when everything else is on the disk"
