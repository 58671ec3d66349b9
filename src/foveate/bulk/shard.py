"""A shard on its way: what is done of it in journals, then published whole.

A worker that takes a shard over reads the journals of all workers before it and writes one of its own, so two workers
on one shard do no harm. Publishing writes the images, and then the entries: their appearance is the moment from which
the shard is done, and whoever comes later leaves it as it is. No time is compared.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from foveate.bulk.journal import Frame, Journal, read_journal
from foveate.bulk.locks import held, saying_what_is_kept
from foveate.bulk.manifest import Item, Key, key_of, order_of, part_path, read_part, sample_key
from foveate.bulk.shards import Container, shard_name
from foveate.core.atomic import move_durably, sync_folder

PATIENCE_S = 600.0
"""How long publishing waits for another process that publishes the same shard: 2 GB take less on any disk."""


_TAKEN_BACK = 16
"""Images of a published shard that are written to a journal at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What is in a published shard.

    Attributes:
        shard: Its number.
        num_images: How many there are.
        num_failed: Entries that are failures.
        image_bytes: Of the encoded images.
        flops_run: Of all images.
        flops_full: Of all images, had everything run.
    """

    shard: int
    num_images: int = 0
    num_failed: int = 0
    image_bytes: int = 0
    flops_run: int = 0
    flops_full: int = 0


class Done(Mapping[Key, dict[str, Any]]):
    """Entries of the items that journals hold, by row and image; read from the files when they are asked for.

    Of a row that failed as a whole nothing is kept once there is an image of it.
    """

    def __init__(self) -> None:
        self.frames: dict[Key, Frame] = {}
        self._rows: set[int] = set()
        """Of images."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.frames[key].entry()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __contains__(self, key: object) -> bool:
        return key in self.frames

    def has_image(self, key: Key) -> bool:
        """Whether an image is there, and no failure."""
        return key in self.frames and not self.frames[key].is_failure

    def ordered(self) -> list[Frame]:
        """All items by row and image."""
        return [self.frames[key] for key in sorted(self.frames, key=order_of)]

    def take(self, key: Key, frame: Frame) -> None:
        """Adds an item; the outcome does not depend on the order in which items come."""
        row, image = key
        if image is None and row in self._rows:
            return
        if key not in self.frames or frame.rank < self.frames[key].rank:
            self.frames[key] = frame
        if not frame.is_failure:
            self._rows.add(row)
            self.frames.pop((row, None), None)


class Shard:
    """The items of one shard; `with` reads its journals. Made by `OutputFolder.shard`."""

    def __init__(self, folder: Path, number: int, container: Container) -> None:
        """Stores where it is; nothing is read yet.

        Args:
            folder: Of the whole run.
            number: Of the shard.
            container: Of the published images.
        """
        self.number = number
        self.done = Done()
        self._folder, self._work, self._container = folder, folder / ".work", container
        self._ends: dict[Path, int] = {}
        """How far journals of other workers were read."""
        self._journal: Journal | None = None

    def __enter__(self) -> "Shard":
        """Reads what was done so far.

        Raises:
            FoveateError: A journal cannot be read.
        """
        self._refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def is_published(self) -> bool:
        """Whether the shard is done, by whichever process."""
        return part_path(self._folder, self.number).is_file()

    def append(self, items: Sequence[Item]) -> None:
        """Keeps items; when this returns they survive a kill and a power cut.

        An image that is done already is left as it is. `file`, `key`, `bytes` and `sha256` are filled in.

        Raises:
            FoveateError: They cannot be written, and none of them counts; earlier ones are as they were.
        """
        fresh = [self._completed(item) for item in items if not self.done.has_image(key_of(item.entry))]
        if not fresh:
            return
        if self._journal is None:
            name = f"{self.number:08d}.{secrets.token_hex(8)}.journal"
            self._journal = Journal(path=self._work / name)
        with saying_what_is_kept(self._folder):
            try:
                found = self._journal.append(fresh)
            finally:
                if not self._journal.is_open:
                    self._journal = None
        for key, frame in found:
            self.done.take(key, frame)

    def publish(self) -> Summary:
        """Makes the shard visible and removes its journals; another process that does so is waited for.

        Raises:
            FoveateError: It cannot be written; nothing of it is visible then, and the journals are as they were.
        """
        busy = (
            f"another process has been publishing shard {self.number} of {self._folder} for {PATIENCE_S / 60:.0f} "
            "minutes; end it, and run the same command again"
        )
        lock = self._work / f"{self.number:08d}.lock"
        with saying_what_is_kept(self._folder), held(lock, PATIENCE_S, busy):
            if not self.is_published:
                self._refresh()
                self._write()
            self._close()
            self._remove(("journal", "part", "lock"))
        return summary_of(self._folder, self.number)

    def take_back(self, entries: Iterable[dict[str, Any]], content: Callable[[Mapping[str, Any]], bytes]) -> None:
        """Makes a published shard one to go on with: its images go to a journal, and its entries go.

        A kill on the way leaves it published, with a journal that is removed later, or taken back.

        Args:
            entries: Of the shard.
            content: Finds the image of an entry.

        Raises:
            FoveateError: It cannot be read or written.
        """
        images = (entry for entry in entries if "error" not in entry)
        while some := list(islice(images, _TAKEN_BACK)):
            self.append([Item(entry, content(entry)) for entry in some])
        with saying_what_is_kept(self._folder):
            part = part_path(self._folder, self.number)
            part.unlink()
            sync_folder(part.parent)

    def _refresh(self) -> None:
        """Takes what journals have more than at the last reading."""
        with saying_what_is_kept(self._folder):
            paths = sorted(self._work.glob(f"{self.number:08d}.*.journal"))
        for path in paths:
            if self._journal is not None and path == self._journal.path:
                continue
            for key, frame in read_journal(path, self._ends.get(path, 0)):
                self._ends[path] = frame.start + frame.entry_bytes + max(0, frame.content_bytes)
                self.done.take(key, frame)

    def _completed(self, item: Item) -> Item:
        if item.content is None:
            return item
        row, image = key_of(item.entry)
        assert image is not None, "a whole row has no image"
        filled = {
            "file": shard_name(self.number, self._container.suffix),
            "key": sample_key(row, image),
            "bytes": len(item.content),
            "sha256": hashlib.sha256(item.content).hexdigest(),
        }
        return replace(item, entry={**item.entry, **filled})

    def _write(self) -> None:
        """Writes the images, then the entries."""
        self._remove(("part",))
        frames = self.done.ordered()
        images = self._folder / shard_name(self.number, self._container.suffix)
        if any(not frame.is_failure for frame in frames):
            self._write_file(
                images, lambda file: self._container.write(file, (f.item() for f in frames if not f.is_failure))
            )
        else:
            # Left by a process that was killed here, from items that are gone since.
            images.unlink(missing_ok=True)
        part = part_path(self._folder, self.number)
        self._write_file(part, lambda file: file.writelines(f.text() + b"\n" for f in frames))

    def _write_file(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        partial = self._work / f"{self.number:08d}.{secrets.token_hex(8)}.part"
        try:
            with partial.open("xb") as file:
                write(file)
            move_durably(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _remove(self, endings: Sequence[str]) -> None:
        """Removes files of this shard from the hidden folder."""
        for ending in endings:
            for path in self._work.glob(f"{self.number:08d}.*{ending}"):
                remove(path)


def summary_of(folder: Path, number: int) -> Summary:
    """What is in a published shard.

    Raises:
        FoveateError: Its entries cannot be read.
    """
    images = failed = size = run = full = 0
    for entry in read_part(part_path(folder, number)):
        if "error" in entry:
            failed += 1
            continue
        images += 1
        size += entry["bytes"]
        run += entry.get("flops_run") or 0
        full += entry.get("flops_full") or 0
    return Summary(shard=number, num_images=images, num_failed=failed, image_bytes=size, flops_run=run, flops_full=full)


def remove(path: Path) -> None:
    """Removes a file that nobody needs; where a process of Windows still has it open, a later run removes it."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return
