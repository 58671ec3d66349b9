"""Containers of a shard's images: how they are written, and how an image is found again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from foveate.bulk.manifest import Item
from foveate.bulk.parquet_shards import ParquetImages, refuse_missing_pyarrow, write_parquet
from foveate.bulk.tar_shards import TarImages, write_tar
from foveate.core.errors import FoveateError


@runtime_checkable
class Images(Protocol):
    """Images of a published shard."""

    def content(self, key: str) -> bytes | None:
        """An image, unchecked; None where there is none of this key.

        Raises:
            FoveateError: The file cannot be read.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A file format of shards.

    Attributes:
        suffix: Of file names, with its dot.
        write: Writes images to an empty file, in their order.
        images: Opens a file.
        check: Raises a FoveateError where what it needs is not installed.
    """

    suffix: str
    write: Callable[[BinaryIO, Iterable[Item]], None]
    images: Callable[[Path], Images]
    check: Callable[[], None]


CONTAINERS = {
    "tar": Container(suffix=".tar", write=write_tar, images=TarImages, check=lambda: None),
    "parquet": Container(suffix=".parquet", write=write_parquet, images=ParquetImages, check=refuse_missing_pyarrow),
}
"""By the name that a run's configuration has."""


def container(name: object) -> Container:
    """The container of a name.

    Raises:
        FoveateError: There is none.
    """
    found = CONTAINERS.get(str(name))
    if found is None:
        raise FoveateError(f"shards must be {' or '.join(CONTAINERS)}, got {name!r}")
    return found


def shard_name(number: int, suffix: str) -> str:
    """File name of a shard."""
    return f"shard-{number:08d}{suffix}"
