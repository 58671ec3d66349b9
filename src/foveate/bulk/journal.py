"""A journal: the items of a shard that is not published yet, in a file that survives a kill at any instruction.

A file is a row of frames: a header, the entry as JSON, the image. The header holds both lengths and a digest of them
and of the entry; the entry holds the SHA-256 of the image. What an interruption cut, or a power cut left as zeros,
fails one of the two and ends the file for a reader. A file is written by the process that made it and by nobody else.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO

from foveate.bulk.manifest import Item, Key, encode_entry, key_of
from foveate.core.atomic import sync_folder
from foveate.core.errors import FoveateError

_MAGIC = b"fvj1"
_HEADER = Struct("<4sIq16s")
"""Magic, bytes of the entry, bytes of the image (-1 for none), digest."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where an item is.

    Attributes:
        path: The journal.
        start: First byte of the entry.
        entry_bytes: Length of the entry.
        content_bytes: Length of the image behind it; -1 for a failure.
        rank: Of several items about one image the smallest is taken, whatever their order: an image before a failure,
            the failure after most attempts, and then the smallest digest.
    """

    path: Path
    start: int
    entry_bytes: int
    content_bytes: int
    rank: tuple[bool, int, bytes]

    @property
    def is_failure(self) -> bool:
        """Whether there is no image."""
        return self.content_bytes < 0

    def entry(self) -> dict[str, Any]:
        """What is said of the item.

        Raises:
            FoveateError: The file is gone, or no longer what it was.
        """
        return dict(json.loads(self.text()))

    def text(self) -> bytes:
        """The entry as `encode_entry` wrote it.

        Raises:
            FoveateError: The file is gone, or no longer what it was.
        """
        return self._checked(self._read(self.entry_bytes))

    def item(self) -> Item:
        """The item, with its image checked.

        Raises:
            FoveateError: The file is gone, or no longer what it was.
        """
        data = self._read(self.entry_bytes + max(0, self.content_bytes))
        entry = json.loads(self._checked(data[: self.entry_bytes]))
        if self.is_failure:
            return Item(entry, None)
        content = data[self.entry_bytes :]
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _damaged(self.path)
        return Item(entry, content)

    def _checked(self, text: bytes) -> bytes:
        if _digest(text, self.content_bytes) != self.rank[-1]:
            raise _damaged(self.path)
        return text

    def _read(self, length: int) -> bytes:
        """The entry, and what is asked for behind it."""
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                return _read_exactly(file, length)
        except OSError as error:
            raise FoveateError(
                f"cannot read {self.path}: {error.strerror or error}; run the same command again"
            ) from None


@dataclass(kw_only=True, slots=True)
class Journal:
    """A new file that this process appends to; it is made at the first item."""

    path: Path
    _file: FileIO | None = field(default=None, init=False)
    _size: int = field(default=0, init=False)

    @property
    def is_open(self) -> bool:
        """Whether the file exists and takes more."""
        return self._file is not None

    def append(self, items: Sequence[Item]) -> list[tuple[Key, Frame]]:
        """Writes items; when this returns they survive a kill and a power cut.

        Returns:
            Where they are.

        Raises:
            OSError: They could not be written, and none of them counts; earlier ones are as they were. Where `is_open`
                is false then, the next items need another journal.
        """
        frames, chunks, place = [], [], self._size
        for item in items:
            head, frame = _framed(item, self.path, place)
            chunks += [head, item.content or b""]
            frames.append((key_of(item.entry), frame))
            place += len(head) + len(item.content or b"")
        is_new = self._file is None
        if self._file is None:
            self._file = self.path.open("xb", buffering=0)
        try:
            _write_all(self._file, b"".join(chunks))
            os.fsync(self._file.fileno())
            if is_new:
                sync_folder(self.path.parent)
        except BaseException:
            self._take_back(self._file)
            raise
        self._size = place
        return frames

    def close(self) -> None:
        """Closes the file; nothing is appended afterwards."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take_back(self, file: FileIO) -> None:
        """Cuts a part of an item off; where even that fails, readers ignore it and the file is left for good."""
        try:
            file.truncate(self._size)
            file.seek(self._size)
        except OSError:
            self.close()


def read_journal(path: Path, start: int = 0) -> Iterator[tuple[Key, Frame]]:
    """Finds the items of a journal, up to its end or its first damaged byte; images are checked, one in memory at once.

    Args:
        path: A journal, which its process may be writing.
        start: Where to begin: 0, or the end of the last frame of an earlier reading.

    Raises:
        FoveateError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            while (found := _next_frame(file, path, start, size)) is not None:
                yield found
                frame = found[1]
                start = frame.start + frame.entry_bytes + max(0, frame.content_bytes)
    except FileNotFoundError:
        # Another process published the shard in the meantime.
        return
    except OSError as error:
        raise FoveateError(f"cannot read {path}: {error.strerror or error}; run the same command again") from None


def _framed(item: Item, path: Path, place: int) -> tuple[bytes, Frame]:
    """Header and entry of an item that goes to a byte of a file."""
    entry = encode_entry(item.entry)
    content_bytes = -1 if item.content is None else len(item.content)
    digest = _digest(entry, content_bytes)
    head = _HEADER.pack(_MAGIC, len(entry), content_bytes, digest) + entry
    return head, _frame(path, place + _HEADER.size, item.entry, (len(entry), content_bytes, digest))


def _frame(path: Path, start: int, entry: dict[str, Any], sizes: tuple[int, int, bytes]) -> Frame:
    entry_bytes, content_bytes, digest = sizes
    return Frame(
        path=path,
        start=start,
        entry_bytes=entry_bytes,
        content_bytes=content_bytes,
        rank=(content_bytes < 0, -int(entry.get("attempts", 0)), digest),
    )


def _next_frame(file: BinaryIO, path: Path, start: int, size: int) -> tuple[Key, Frame] | None:
    """The frame at a byte; None where there is none that is whole."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, entry_bytes, content_bytes, digest = _HEADER.unpack(header)
    # Lengths of a damaged header are not believed: nothing longer than the file is read.
    if magic != _MAGIC or start + _HEADER.size + entry_bytes + max(0, content_bytes) > size:
        return None
    text = file.read(entry_bytes)
    if _digest(text, content_bytes) != digest:
        return None
    entry = json.loads(text)
    if content_bytes >= 0 and hashlib.sha256(file.read(content_bytes)).hexdigest() != entry["sha256"]:
        return None
    return key_of(entry), _frame(path, start + _HEADER.size, entry, (entry_bytes, content_bytes, digest))


def _digest(entry: bytes, content_bytes: int) -> bytes:
    return hashlib.blake2b(b"%d %d " % (len(entry), content_bytes) + entry, digest_size=16).digest()


def _write_all(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_exactly(file: FileIO, length: int) -> bytes:
    parts: list[bytes] = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _damaged(path: Path) -> FoveateError:
    return FoveateError(f"{path} was damaged since it was written; run the same command again, which repairs it")
