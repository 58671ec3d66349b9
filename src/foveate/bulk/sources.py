"""Inputs of bulk generation: files of prompts, JSON, csv, tsv and parquet, and folders of them; read from any row on.

Files are read in passes and never held: a source takes 16 bytes a shard, and while it is opened 8 bytes an id.
"""

import hashlib
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from foveate.bulk.byte_stream import Mark
from foveate.bulk.columns import Columns
from foveate.bulk.csv_rows import csv_table
from foveate.bulk.json_list import parse_list
from foveate.bulk.line_rows import parse_objects, parse_prompts
from foveate.bulk.parquet_rows import parquet_table
from foveate.bulk.rows import BadRow, Row
from foveate.bulk.scan import Part, Scan, Scanner
from foveate.bulk.tables import Record, Table, changed, stamp_of, text_opener
from foveate.core.errors import FoveateError

_GZIP = ".gz"


@runtime_checkable
class Source(Protocol):
    """An input: rows by index. It holds nothing open that another process could not, and can be pickled.

    Attributes:
        name: Of the file or folder, without where it lies.
    """

    name: str

    def read(self, start: int, stop: int) -> Iterator[Row | BadRow]:
        """The rows from one index to another, the end excluded; those that do not exist are left out.

        Raises:
            FoveateError: A file cannot be read, or has changed since it was scanned.
        """
        ...


class FileSource:
    """A `Source` of one file or several.

    Reading goes on where it ended, so rows in order are read once, whatever the format; other rows are sought from the
    mark before them, in compressed files and in UTF-16 from the beginning.
    """

    def __init__(self, *, name: str, parts: Sequence[Part], mapping: Mapping[str, str], has_ids: bool) -> None:
        """Takes what a scan found.

        Args:
            name: Of the file or folder.
            parts: Tables with rows, in order.
            mapping: Names of columns for what they say.
            has_ids: Whether every row needs an id.
        """
        self.name, self._parts, self._mapping, self._has_ids = name, tuple(parts), dict(mapping), has_ids
        self._firsts = [part.first for part in self._parts]
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_idle", "_columns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def read(self, start: int, stop: int) -> Iterator[Row | BadRow]:
        """The rows from one index to another.

        Raises:
            FoveateError: A file cannot be read, or has changed since it was scanned.
        """
        start = max(start, 0)
        for place in range(max(bisect_right(self._firsts, start) - 1, 0), len(self._parts)):
            part = self._parts[place]
            first, behind = max(start, part.first), min(stop, part.first + part.count)
            if first < behind:
                yield from self._read(place, first, behind)

    def _prepare(self) -> None:
        self._columns = Columns(mapping=self._mapping, are_texts=self._parts[0].table.are_texts)
        # One that is taken by two threads at once is taken by one of them.
        self._idle: deque[tuple[int, int, Iterator[Record]]] = deque(maxlen=1)

    def _read(self, place: int, first: int, behind: int) -> Iterator[Row | BadRow]:
        part, index = self._parts[place], first
        records = self._records_at(place, first)
        for record in islice(records, behind - first):
            yield self._row(part, index, record)
            index += 1
        if index < behind:
            raise changed(part.table)
        self._idle.append((place, behind, records))

    def _records_at(self, place: int, first: int) -> Iterator[Record]:
        """The records of a part from a row on."""
        part = self._parts[place]
        marked, mark = part.mark(first - part.first)
        row = part.first + marked
        try:
            in_part, at, records = self._idle.pop()
        except IndexError:
            in_part = -1
        if in_part != place or not row <= at <= first:
            records = _from_mark(part, mark)
            at = row
        next(islice(records, first - at, first - at), None)
        return records

    def _row(self, part: Part, index: int, record: Record) -> Row | BadRow:
        _, number, names, values = record
        found = str(index)
        try:
            if names is None:
                raise FoveateError(str(values))
            layout = self._columns.layout(names)
            found = layout.id_of(values) or found
            content = layout.read(values)
            if content.id is None and self._has_ids:
                raise FoveateError("no id, but other rows have one; ids name images, so give it one")
        except FoveateError as error:
            return BadRow(index=index, id=found, where=part.where(number), reason=" ".join(str(error).split("\n")))
        return Row(index=index, id=found, prompt=content.prompt, options=content.options, extra=content.extra)


def open_source(
    path: Path, columns: Mapping[str, str], shard_size: int, limit: int | None = None
) -> tuple[Source, Scan]:
    """Scans a file, or a folder of files of one format, and gives it as a source.

    Args:
        path: A file whose ending says its format (`.txt`, `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, all also with
            `.gz` behind, or `.parquet`), or a folder; its files are taken in order of their paths, without hidden ones.
        columns: Names of columns for what they say, such as prompt: caption.
        shard_size: Rows that are read together; only for speed.
        limit: Leaves out all rows behind the first so many.

    Raises:
        FoveateError: It cannot be read, has no rows or no prompts, names a column that a row cannot say, or has an id
            twice.
    """
    if limit is not None and limit < 1:
        raise FoveateError(f"the limit must be 1 row or more, got {limit}")
    files = _files(path)
    is_folder = path.is_dir()
    open_table = _FORMATS[_format_of(files[0])]  # type: ignore[index]  # `_files` takes no others
    if open_table is _prompts and columns:
        raise FoveateError(f"{path} has a prompt a line and no columns; leave out --column")
    tables = [open_table(file, file.relative_to(path).as_posix() if is_folder else file.name) for file in files]
    name = path.absolute().name
    scanner = Scanner(columns, shard_size, limit)
    scan = scanner.scan(tables, name, _digest_of_files if is_folder else _digest_of_one)
    parts = [part for part in scanner.parts if part.count]
    return FileSource(name=name, parts=parts, mapping=columns, has_ids=scanner.has_ids), scan


def _from_mark(part: Part, mark: Mark) -> Iterator[Record]:
    if stamp_of(part.table) != part.stamp:
        raise changed(part.table)
    with part.table.open(mark) as reading:
        yield from reading.records()


def _digest_of_one(digests: Sequence[bytes]) -> str:
    (one,) = digests
    return one.hex()


def _digest_of_files(digests: Sequence[bytes]) -> str:
    """The hash of the hashes in order: what files are called decides nothing but the order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _prompts(path: Path, name: str) -> Table:
    return Table(path=path.absolute(), name=name, opener=text_opener(parse_prompts))


def _objects(path: Path, name: str) -> Table:
    return Table(path=path.absolute(), name=name, opener=text_opener(parse_objects))


def _list(path: Path, name: str) -> Table:
    return Table(path=path.absolute(), name=name, opener=text_opener(parse_list), unit="entry")


def _comma(path: Path, name: str) -> Table:
    return csv_table(path.absolute(), name, ",")


def _tab(path: Path, name: str) -> Table:
    return csv_table(path.absolute(), name, "\t")


def _parquet(path: Path, name: str) -> Table:
    return parquet_table(path.absolute(), name)


_FORMATS: dict[str, Callable[[Path, str], Table]] = {
    ".txt": _prompts,
    ".jsonl": _objects,
    ".ndjson": _objects,
    ".json": _list,
    ".csv": _comma,
    ".tsv": _tab,
    ".parquet": _parquet,
}


def _format_of(path: Path) -> str | None:
    """The ending that says a file's format, or None."""
    name = path.name.lower()
    is_compressed = name.endswith(_GZIP)
    ending = Path(name.removesuffix(_GZIP)).suffix
    return ending if ending in _FORMATS and not (is_compressed and ending == ".parquet") else None


def _files(path: Path) -> list[Path]:
    """The files of an input, in order."""
    if str(path) == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        what = "stdin" if str(path) == "-" else str(path)
        raise FoveateError(
            f"{what} cannot be read twice, and a run that was stopped reads its input again; save it to a file"
        )
    if path.is_dir():
        return _files_of_folder(path)
    if not path.exists():
        raise FoveateError(f"there is no file or folder {path}")
    if _format_of(path) is None:
        raise FoveateError(f"{path} has no known ending; there are {_ENDINGS}")
    return [path]


_ENDINGS = f"{', '.join(_FORMATS)}, and all but parquet with {_GZIP} behind"


def _files_of_folder(folder: Path) -> list[Path]:
    """Files of a known format in a folder and the folders in it, by path; hidden ones are left out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    files = {file: ending for file in found if (ending := _format_of(file)) is not None}
    if not files:
        raise FoveateError(f"{folder} has no file with a known ending; there are {_ENDINGS}")
    by_format: dict[Any, str] = {}
    for ending in files.values():
        by_format.setdefault(_FORMATS[ending], ending)
    if len(by_format) > 1:
        raise FoveateError(
            f"{folder} has files of several formats, {' and '.join(sorted(by_format.values()))}; move all but one into "
            "another folder, or name a single file"
        )
    return sorted(files, key=lambda file: file.relative_to(folder).parts)
