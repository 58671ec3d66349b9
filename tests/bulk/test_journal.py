"""A journal survives being cut anywhere, and never gives an item that is not whole."""

import hashlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from foveate.bulk.journal import Journal, read_journal
from foveate.bulk.manifest import Item, key_of
from foveate.bulk.shard import Done
from foveate.core.errors import FoveateError
from tests.bulk.bulk_items import a_failure, a_run, an_item, content_of, hidden, visible


def found_in(path: Path) -> dict[tuple[int, int | None], Item]:
    return {key: frame.item() for key, frame in read_journal(path)}


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[int]]:
    """A journal of an image, two failures and an image, and where its items end."""
    images = [
        Item({"row": row, "image": 0, "sha256": hashlib.sha256(content).hexdigest()}, content)
        for row, content in ((0, b"abc"), (3, b"defg"))
    ]
    failures = [Item({"row": row, "image": image, "error": ""}, None) for row, image in ((1, None), (2, 0))]
    journal = Journal(path=tmp_path / "whole")
    ends = []
    for item in (images[0], *failures, images[1]):
        journal.append([item])
        ends.append((tmp_path / "whole").stat().st_size)
    journal.close()
    return tmp_path / "whole", ends


def test_a_cut_at_any_byte_loses_the_item_that_it_is_in_and_no_other(written: tuple[Path, list[int]]) -> None:
    path, ends = written
    data, whole = path.read_bytes(), found_in(path)
    assert list(whole) == [(0, 0), (1, None), (2, 0), (3, 0)]
    cut = path.with_name("cut")
    for size in range(len(data) + 1):
        # What a power cut leaves: the file ends, or goes on as zeros.
        cut.write_bytes(data[:size] + bytes(70 * (size % 2)))
        kept = found_in(cut)
        assert list(kept) == list(whole)[: sum(end <= size for end in ends)]
        assert all(item == whole[key] for key, item in kept.items())


def test_a_flipped_bit_anywhere_gives_no_wrong_item(written: tuple[Path, list[int]]) -> None:
    path, ends = written
    data, whole = path.read_bytes(), found_in(path)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        kept = found_in(path)
        assert list(kept) == list(whole)[: sum(end <= place for end in ends)]
        assert all(item == whole[key] for key, item in kept.items())


def test_damage_after_reading_is_found_before_it_is_published(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as shard:
        shard.append([an_item(0), an_item(1)])
    with run.shard(0) as shard:
        (path,) = (tmp_path / "out/.work").glob("*.journal")
        data = path.read_bytes()
        path.write_bytes(data.replace(content_of(1), bytes(40)))
        with pytest.raises(FoveateError, match="was damaged since it was written; run the same command again"):
            shard.publish()
    assert visible(tmp_path / "out").keys() == {"run.json"}
    with run.shard(0) as shard:
        assert list(shard.done) == [(0, 0)]
        shard.append([an_item(1)])
        assert shard.publish().num_images == 2
    assert [run.content(e) for e in run.entries()] == [content_of(0), content_of(1)]


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as writer, run.shard(0) as reader:
        writer.append([an_item(0)])
        reader.append([an_item(2)])
        writer.append([an_item(1)])
        assert reader.publish().num_images == 3
    assert [e["row"] for e in run.entries()] == [0, 1, 2]


def test_a_row_that_failed_gives_way_to_its_images_in_any_order(written: tuple[Path, list[int]]) -> None:
    frames = dict(read_journal(written[0]))
    image, failure = frames[0, 0], frames[1, None]
    for items in ([((5, 0), image), ((5, None), failure)], [((5, None), failure), ((5, 0), image)]):
        done = Done()
        for key, frame in items:
            done.take(key, frame)
        assert list(done) == [(5, 0)]
    # A failure of an image says nothing of the others, so both stay.
    done.take((6, None), failure)
    done.take((6, 0), frames[2, 0])
    assert set(done) == {(5, 0), (6, None), (6, 0)}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process may get longer, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_a_full_disk_gives_one_line_and_the_run_goes_on_afterwards(tmp_path: Path, container: str) -> None:
    run = a_run(tmp_path / "out", container)
    with run.shard(0) as shard:
        shard.append([an_item(0, content=bytes(3000))])
        with room_for(4000):
            with pytest.raises(FoveateError, match="cannot write to .*: File too large; what is done is kept") as said:
                shard.append([an_item(1), an_item(2, content=bytes(3000))])
            assert "\n" not in str(said.value)
            assert list(shard.done) == [(0, 0)]
            # A smaller one still fits, behind what was taken back.
            shard.append([an_item(3)])
        with room_for(2000), pytest.raises(FoveateError, match="File too large; what is done is kept"):
            shard.publish()
        assert visible(tmp_path / "out").keys() == {"run.json"}
        assert hidden(tmp_path / "out", ".part") == []
        assert len(hidden(tmp_path / "out", ".journal")) == 1
    with run.shard(0) as shard:
        assert set(shard.done) == {(0, 0), (3, 0)}
        shard.append([an_item(1)])
        shard.publish()
    assert [e["row"] for e in run.entries()] == [0, 1, 3]
    run.content(next(run.entries()))
    assert run.write_failed() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_full_until_somebody_makes_room(small_disk: Path) -> None:
    run = a_run(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8192))
    count = 0

    def fill() -> None:
        nonlocal count
        while True:
            shard.append([an_item(count, content=bytes(5000))])
            count += 1

    with run.shard(0) as shard:
        with pytest.raises(FoveateError, match="No space left on device; what is done is kept") as said:
            fill()
        assert "\n" not in str(said.value)
        assert list(shard.done) == [(row, 0) for row in range(count)]
        with pytest.raises(FoveateError, match="No space left on device"):
            shard.publish()
        filler.unlink()
        # The journal takes more at once.
        shard.append([an_item(count, content=bytes(5000))])
    with run.shard(0) as shard:
        assert set(shard.done) == {(row, 0) for row in range(count + 1)}
        with pytest.raises(FoveateError, match="No space left on device"):
            shard.publish()
    assert visible(small_disk).keys() == {"run.json"}
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    with run.shard(0) as shard:
        assert shard.publish().num_images == count + 1
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with run.shard(1) as shard, pytest.raises(FoveateError, match="Read-only file system"):
        shard.append([an_item(9)])
    assert len(list(run.entries())) == count + 1
    with pytest.raises(FoveateError, match="Read-only file system"):
        a_run(small_disk)


def test_reading_imports_no_torch() -> None:
    # Ray's driver and scripts for job arrays read manifests; they need not load torch.
    code = "import sys, foveate.bulk.output; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_keys_are_those_of_entries() -> None:
    assert key_of(a_failure(4).entry) == (4, None)
    with pytest.raises(AssertionError, match=r"\['colour'\] must be declared"):
        an_item(0, colour="red")
    with pytest.raises(AssertionError, match="a failure has an error"):
        Item(a_failure(4).entry, b"image")
