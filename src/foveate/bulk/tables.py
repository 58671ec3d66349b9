"""A file of rows, whatever its format: opened at a mark, it gives one record a row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from foveate.bulk.byte_stream import ByteStream, Mark
from foveate.core.errors import FoveateError

Record = tuple[int, int, tuple[str, ...] | None, Sequence[Any] | str]
"""Offset and number of a row (as in `Mark`), and the names and values of its columns; no names and the reason of a row
that cannot be read. A plain tuple, as there are millions."""

Parser = Callable[[ByteStream, Mark], Iterator[Record]]
"""Gives the rows of a text file from a mark on."""


class Stamp(NamedTuple):
    """What tells that a file is not the one that was scanned."""

    size: int
    mtime_ns: int


@runtime_checkable
class Reading(Protocol):
    """A table that is open."""

    @property
    def is_seekable(self) -> bool:
        """Whether its table can be opened at any mark, or at the beginning alone."""
        ...

    def records(self) -> Iterator[Record]:
        """The rows from the mark on."""
        ...

    def sha256(self) -> bytes:
        """The hash of the whole content, whatever was read of it; of one that was opened at the beginning."""
        ...


Opener = Callable[["Table", Mark], AbstractContextManager[Reading]]
"""Opens a table at a mark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One file of rows. It holds nothing open, so that it can be sent to another process.

    Attributes:
        path: Where it is, from the root.
        name: Said in errors.
        opener: Opens it at a mark.
        unit: What its rows are called in errors: line, entry or row.
        header: Its columns, where the file says them once.
        unused: Columns that are never read, as JSON cannot hold what is in them.
        are_texts: Whether all cells are texts.
    """

    path: Path
    name: str
    opener: Opener
    unit: str = "line"
    header: tuple[str, ...] | None = None
    unused: tuple[str, ...] = ()
    are_texts: bool = False

    def open(self, at: Mark) -> AbstractContextManager[Reading]:
        """Opens it.

        Raises:
            FoveateError: It cannot be read.
        """
        return self.opener(self, at)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReading:
    """A `Reading` of a text file.

    Attributes:
        stream: The open file.
        parse: Gives its rows.
        at: Where it was opened.
    """

    stream: ByteStream
    parse: Parser
    at: Mark

    @property
    def is_seekable(self) -> bool:
        """Whether the file can be opened in the middle."""
        return self.stream.is_seekable

    def records(self) -> Iterator[Record]:
        """The rows from the mark on."""
        return self.parse(self.stream, self.at)

    def sha256(self) -> bytes:
        """The hash of the whole content."""
        return self.stream.sha256()


def text_opener(parse: Parser) -> Opener:
    """Opens text files whose rows a parser gives."""
    return partial(_open_text, parse=parse)


@contextmanager
def _open_text(table: Table, at: Mark, *, parse: Parser) -> Iterator[TextReading]:
    with ByteStream(table.path, table.name, at.offset) as stream:
        yield TextReading(stream=stream, parse=parse, at=at)


def stamp_of(table: Table) -> Stamp:
    """Size and time of a table's file.

    Raises:
        FoveateError: It is not there any more.
    """
    try:
        found = table.path.stat()
    except OSError as error:
        raise FoveateError(f"cannot read {table.name}: {error.strerror or error}") from None
    return Stamp(found.st_size, found.st_mtime_ns)


def changed(table: Table) -> FoveateError:
    """What is said of a file that is not the one that was scanned."""
    return FoveateError(f"{table.name} has changed since it was scanned; start the same command again")
