"""One pass over an input: counts rows, hashes the content, marks where shards begin, finds ids that are there twice."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from foveate.bulk.byte_stream import Mark
from foveate.bulk.columns import PROMPT, Columns, near_misses
from foveate.bulk.tables import Record, Stamp, Table, changed, stamp_of
from foveate.core.errors import FoveateError

LEAST_STEP = 256
"""Rows between two marks, at least, so that marks of tiny shards take no memory to speak of."""

_MOST_SUSPECTS = 1000
"""Hashes that are looked at again in one pass."""

_CHUNK = 1 << 20
_MOST_NAMED = 20
"""Columns that an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """What one pass over an input found.

    Attributes:
        num_rows: Rows, the unreadable ones too; the limit where there are more.
        num_bad: How many of them cannot be read.
        sha256: Of the whole content, decompressed; the limit does not matter.
        extra_columns: Columns that say nothing and are carried into the manifest.
        unused_columns: Columns that hold bytes, which a manifest cannot.
        notes: What to tell people, one line each: columns that are nearly known ones, and those that are not used.
    """

    num_rows: int
    num_bad: int
    sha256: str
    extra_columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A table and where its rows are; 16 bytes a mark.

    Attributes:
        table: The table.
        first: Index of its first row in the whole input.
        count: Its rows.
        step: Rows between two marks.
        offsets: Offset of every mark.
        numbers: Number of every mark.
        stamp: Of its file when it was scanned.
        is_seekable: Whether a mark can be opened; it has one mark otherwise.
    """

    table: Table
    first: int
    count: int
    step: int
    offsets: "array[int]"
    numbers: "array[int]"
    stamp: Stamp
    is_seekable: bool

    def mark(self, row: int) -> tuple[int, Mark]:
        """The last marked row of the table that is not behind a row, and its mark."""
        place = row // self.step if self.is_seekable else 0
        return place * self.step, Mark(self.offsets[place], self.numbers[place])

    def where(self, number: int) -> str:
        """The place of a row, as errors name it."""
        return f"{self.table.name} {self.table.unit} {number}"


class Scanner:
    """Scans the tables of an input, one after the other.

    Attributes:
        num_rows: Rows so far.
        num_bad: Rows so far that cannot be read.
        num_without_id: Other rows so far that have no id.
        hashes: One per id.
        parts: The tables so far.
    """

    def __init__(self, mapping: Mapping[str, str], step: int, limit: int | None) -> None:
        """Prepares a pass.

        Args:
            mapping: Names of columns for what they say.
            step: Rows between two marks.
            limit: Rows that count; None for all.
        """
        self._mapping, self._step, self._limit = mapping, max(step, LEAST_STEP), limit
        self._columns = Columns(mapping=mapping, are_texts=False)
        self.num_rows, self.num_bad, self.num_without_id = 0, 0, 0
        self.hashes: array[int] = array("q")
        self.parts: list[Part] = []

    @property
    def has_ids(self) -> bool:
        """Whether some row has an id, so that all need one."""
        return bool(self.hashes)

    def scan(self, tables: Sequence[Table], name: str, digest_of: Callable[[Sequence[bytes]], str]) -> Scan:
        """Scans all tables.

        Args:
            tables: All of one format.
            name: Said in errors.
            digest_of: Makes one hash of those of the tables.

        Raises:
            FoveateError: A table cannot be read, has no prompts or a column that a row cannot say, or ids are not
                unique.
        """
        self._columns = Columns(mapping=self._mapping, are_texts=tables[0].are_texts)
        for table in tables:
            self._check_header(table)
        digests = [self._scan(table) for table in tables]
        if not self.num_rows:
            raise FoveateError(f"{name} has no rows; write one prompt a row")
        self._check_columns(name)
        if (twice := find_duplicate(self.hashes, self._ids)) is not None:
            raise FoveateError(
                f"the id {twice[0]!r} is there twice, in {twice[1]} and {twice[2]}; ids name images, so give each row "
                "its own, or leave the column out"
            )
        unused = tuple(dict.fromkeys(column for table in tables for column in table.unused))
        extra = self._columns.extra()
        left_out = [f"the column {column} holds bytes and is left out" for column in unused]
        return Scan(
            num_rows=self.num_rows,
            num_bad=self.num_bad + (self.num_without_id if self.has_ids else 0),
            sha256=digest_of(digests),
            extra_columns=extra,
            unused_columns=unused,
            notes=(*near_misses(extra), *left_out),
        )

    def _check_header(self, table: Table) -> None:
        if table.header is None:
            return
        layout = self._columns.layout(table.header)
        if layout.problem:
            raise FoveateError(f"{table.name}: {layout.problem}")
        self._check_known(table.name, table.header, table.unused)

    def _check_columns(self, name: str) -> None:
        """What can only be known behind the last row, where every row has columns of its own."""
        seen = self._columns.seen
        if not seen:
            part = self.parts[0]
            number, reason = part.numbers[0], next(_records(part))[3]
            raise FoveateError(f"no row of {name} can be read; {part.where(number)}: {reason}")
        self._check_known(name, list(seen), ())

    def _check_known(self, name: str, names: Sequence[str], unused: Sequence[str]) -> None:
        needed = [self._columns.column_of(PROMPT), *self._mapping.values()]
        for column in needed:
            if column not in names:
                raise _no_column(name, column, names, unused)

    def _scan(self, table: Table) -> bytes:
        """Scans a table, and gives its hash."""
        stamp, before = stamp_of(table), self.num_rows
        offsets, numbers = array("Q"), array("Q")
        with table.open(Mark()) as reading:
            left = None if self._limit is None else self._limit - before
            step = self._step if reading.is_seekable else None
            self._take(islice(reading.records(), left), step, (offsets, numbers))
            digest = reading.sha256()
            is_seekable = reading.is_seekable
        if stamp_of(table) != stamp:
            raise changed(table)
        self.parts.append(
            Part(
                table=table,
                first=before,
                count=self.num_rows - before,
                step=self._step,
                offsets=offsets,
                numbers=numbers,
                stamp=stamp,
                is_seekable=is_seekable,
            )
        )
        return digest

    def _take(self, records: Iterator[Record], step: int | None, marks: "tuple[array[int], array[int]]") -> None:
        """Counts records, and marks every one that is so many rows behind the mark before; only the first for None."""
        count = num_bad = num_without = 0
        layout_of, add = self._columns.layout, self.hashes.append
        if step is None:
            for column in marks:
                column.append(1 if column is marks[1] else 0)
        for offset, number, names, values in records:
            if step is not None and count % step == 0:
                marks[0].append(offset)
                marks[1].append(number)
            count += 1
            if names is None:
                num_bad += 1
                continue
            layout = layout_of(names)
            try:
                identity = layout.read(values).id
                num_without += identity is None
            except FoveateError:
                num_bad += 1
                identity = layout.id_of(values)
            if identity is not None:
                add(hash(identity))
        self.num_rows += count
        self.num_bad += num_bad
        self.num_without_id += num_without

    def _ids(self) -> Iterator[tuple[str, str]]:
        """Every id and its place."""
        columns = self._columns
        for part in self.parts:
            for _, number, names, values in islice(_records(part), part.count):
                if names is not None and (found := columns.layout(names).id_of(values)) is not None:
                    yield found, part.where(number)


def find_duplicate(hashes: "array[int]", ids: Callable[[], Iterator[tuple[str, str]]]) -> tuple[str, str, str] | None:
    """An id that is there twice, and both places, or None.

    Args:
        hashes: `hash` of every id, in 64 bits; they are sorted in place.
        ids: Gives every id and its place again, as two ids may have one hash.
    """
    numbers = np.frombuffer(hashes, dtype=np.int64) if hashes else np.empty(0, dtype=np.int64)
    numbers.sort()
    suspects: set[int] = set()
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK + 1]
        for hit in chunk[1:][chunk[1:] == chunk[:-1]]:
            suspects.add(int(hit))
            if len(suspects) >= _MOST_SUSPECTS:
                if (found := _confirmed(suspects, ids())) is not None:
                    return found
                suspects.clear()
    return _confirmed(suspects, ids()) if suspects else None


def _confirmed(suspects: set[int], ids: Iterator[tuple[str, str]]) -> tuple[str, str, str] | None:
    seen: dict[str, str] = {}
    for name, where in ids:
        if hash(name) in suspects:
            if name in seen:
                return name, seen[name], where
            seen[name] = where
    return None


def _records(part: Part) -> Iterator[Record]:
    with part.table.open(Mark()) as reading:
        yield from reading.records()


def _no_column(name: str, column: str, names: Sequence[str], unused: Sequence[str]) -> FoveateError:
    rest = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    there = f"{', '.join(names[:_MOST_NAMED])}{rest}" if names else "none that hold text"
    hint = "--column prompt=NAME says which one holds the prompts" if column == PROMPT else "see --column"
    why = " (it holds bytes)" if column in unused else ""
    return FoveateError(f"{name} has no column {column}{why}; there are {there}; {hint}")
