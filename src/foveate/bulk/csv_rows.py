"""Rows of csv and tsv files: cells in quotes may hold separators, quotes written twice, and ends of lines."""

import csv
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from foveate.bulk.byte_stream import ByteStream, Mark, lines
from foveate.bulk.tables import Record, Table, text_opener
from foveate.core.errors import FoveateError

_Line = tuple[int, int, bytes]


def csv_table(path: Path, name: str, separator: str) -> Table:
    """A csv file; its first row names the columns.

    Args:
        path: Where.
        name: Said in errors.
        separator: Between cells.

    Raises:
        FoveateError: The file cannot be read, is empty, or names a column twice.
    """
    with ByteStream(path, name) as stream:
        first = next(_records(lines(stream, Mark()), separator), None)
    if first is None:
        raise FoveateError(f"{name} is empty; its first line names the columns, such as prompt{separator}seed")
    _, number, cells = first
    if isinstance(cells, str):
        raise FoveateError(f"{name} line {number} should name the columns: {cells}")
    # A column without a name is how pandas writes an index.
    header = tuple(cell.strip() or f"column {place}" for place, cell in enumerate(cells, start=1))
    if twice := next((cell for cell in header if header.count(cell) > 1), None):
        raise FoveateError(f"{name} has the column {twice!r} twice; rename one of them")
    parse = partial(_parse, separator=separator, header=header)
    return Table(path=path, name=name, opener=text_opener(parse), header=header, are_texts=True)


def _parse(stream: ByteStream, at: Mark, *, separator: str, header: tuple[str, ...]) -> Iterator[Record]:
    """Rows from a mark on; blank lines are none."""
    records = _records(lines(stream, at), separator)
    if at.offset == 0:
        next(records, None)
    width = len(header)
    for offset, number, cells in records:
        if isinstance(cells, str):
            yield offset, number, None, cells
        elif len(cells) == width:
            yield offset, number, header, cells
        else:
            yield (
                offset,
                number,
                None,
                f"{len(cells)} cells, but {width} columns; a cell with {separator!r} needs quotes",
            )


def _records(found: Iterator[_Line], separator: str) -> Iterator[tuple[int, int, list[str] | str]]:
    """Offset, first line and cells of every row, or the reason why its first line is none.

    A quote that is never closed takes many lines with it: only its own line is lost, the others are read again.
    """
    taken: list[_Line] = []
    again: deque[_Line] = deque()

    def feed() -> Iterator[str]:
        while (line := again.popleft() if again else next(found, None)) is not None:
            taken.append(line)
            yield line[2].decode(errors="surrogateescape")

    reader = csv.reader(feed(), delimiter=separator, strict=True)
    while True:
        taken.clear()
        try:
            cells: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = f"cells cannot be told apart ({error}); a quote inside quotes is written twice"
            again.extendleft(reversed(taken[1:]))
            reader = csv.reader(feed(), delimiter=separator, strict=True)
        if cells:
            offset, number, _ = taken[0]
            yield offset, number, cells
