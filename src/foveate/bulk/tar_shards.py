"""Shards as tar files in the layout of WebDataset: `<key>.png`, `<key>.json` (the entry) and `<key>.txt` (the prompt).

Times, owners and permissions are constants, so the same images give the same bytes.
Source: https://github.com/webdataset/webdataset, the file format.
"""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from foveate.bulk.manifest import Item, encode_entry
from foveate.core.errors import FoveateError

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""Endings of members by the format of an image."""


def write_tar(file: BinaryIO, items: Iterable[Item]) -> None:
    """Writes a shard; one image is in memory at a time.

    Args:
        file: Empty, open for writing.
        items: Images, in the order in which they are to stand there.

    Raises:
        OSError: It cannot be written.
    """
    size = 0
    for item in items:
        for suffix, content in _members(item):
            padding = -len(content) % tarfile.BLOCKSIZE
            file.writelines((header(f"{item.entry['key']}.{suffix}", len(content)), content, bytes(padding)))
            size += tarfile.BLOCKSIZE + len(content) + padding
    # Two empty blocks end an archive, which is a multiple of a record long.
    size += 2 * tarfile.BLOCKSIZE
    file.write(bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE))


def header(name: str, size: int) -> bytes:
    """The header of a member, as `tarfile` writes it, in a tenth of the time and in every version the same.

    Args:
        name: ASCII, up to 100 characters.
        size: Bytes of the member, below 8 GiB.
    """
    fields = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0",
        b"        ",
        b"0".ljust(101, b"\0") + b"ustar\00000",
    )
    block = b"".join(fields).ljust(tarfile.BLOCKSIZE, b"\0")
    return block[:148] + b"%06o\0" % sum(block) + block[155:]


class TarImages:
    """Images of a published shard by key; no file stays open."""

    def __init__(self, path: Path) -> None:
        """Reads what is where.

        Raises:
            FoveateError: It cannot be read.
        """
        self._path = path
        try:
            with tarfile.open(path) as archive:
                self._places = dict(_images(archive))
        except (OSError, tarfile.TarError) as error:
            raise FoveateError(f"cannot read {path}: {error}; restore it from a copy") from None

    def content(self, key: str) -> bytes | None:
        """An image, unchecked; None where there is none of this key.

        Raises:
            FoveateError: The file cannot be read.
        """
        if key not in self._places:
            return None
        start, length = self._places[key]
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise FoveateError(f"cannot read {self._path}: {error.strerror}; restore it from a copy") from None


def _members(item: Item) -> Iterator[tuple[str, bytes]]:
    assert item.content is not None, "failures are in the manifest alone"
    yield SUFFIXES[item.entry["format"]], item.content
    yield "json", encode_entry(item.entry)
    yield "txt", str(item.entry.get("prompt", "")).encode(errors="replace")


def _images(archive: tarfile.TarFile) -> Iterator[tuple[str, tuple[int, int]]]:
    for member in archive:
        key, _, suffix = member.name.partition(".")
        if suffix in SUFFIXES.values():
            yield key, (member.offset_data, member.size)
