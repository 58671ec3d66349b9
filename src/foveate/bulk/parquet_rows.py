"""Rows of parquet files, as JSON has them: times and decimals become texts, and columns of bytes are left out."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from foveate.bulk.byte_stream import Mark
from foveate.bulk.tables import Record, Table
from foveate.core.errors import FoveateError

if TYPE_CHECKING:
    import pyarrow  # it has no types

_BATCH_ROWS = 1000
"""Rows that are decoded at once."""

_BUFFER_BYTES = 1 << 20
"""Of a column that are read at once; without it a whole row group is."""


def parquet_table(path: Path, name: str) -> Table:
    """A parquet file.

    Raises:
        FoveateError: It cannot be read, names a column twice, or pyarrow is missing.
    """
    with _readable(name), _opened(path) as file:
        schema = file.schema_arrow
    columns = schema.names
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise FoveateError(f"{name} has the column {twice!r} twice; rename one of them")
    header = tuple(field.name for field in schema if _json_type(field.type) is not None)
    unused = tuple(column for column in columns if column not in header)
    return Table(path=path, name=name, opener=ParquetReading, unit="row", header=header, unused=unused)


class ParquetReading:
    """A `Reading` of a parquet file, where the offset of a mark is the index of a row.

    Whole row groups are skipped, and the rows of one in front of the mark decoded.
    """

    def __init__(self, table: Table, at: Mark) -> None:
        """Opens it at a mark."""
        self._table, self._header, self._at = table, table.header or (), at
        with _readable(table.name):
            self._file = _parquet().ParquetFile(table.path, buffer_size=_BUFFER_BYTES)

    def __enter__(self) -> "ParquetReading":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def is_seekable(self) -> bool:
        """Always so."""
        return True

    def records(self) -> Iterator[Record]:
        """The rows from the mark on."""
        first, row = self._first_group()
        header = self._header
        for columns, skipped, length in self._batches(first, self._at.offset - row):
            row += skipped
            for values in zip(*columns, strict=True) if columns else ((),) * length:
                yield row, row + 1, header, values
                row += 1

    def sha256(self) -> bytes:
        """The hash of the file."""
        with _readable(self._table.name), self._table.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _first_group(self) -> tuple[int, int]:
        """The row group of the mark, and its first row."""
        row = 0
        for group in range(self._file.num_row_groups):
            behind = row + self._file.metadata.row_group(group).num_rows
            if behind > self._at.offset:
                return group, row
            row = behind
        return self._file.num_row_groups, row

    def _batches(self, group: int, skip: int) -> Iterator[tuple[list[list[Any]], int, int]]:
        """The values of every column, how many rows were skipped in front of them, and how many there are."""
        groups, names = list(range(group, self._file.num_row_groups)), list(self._header)
        with _readable(self._table.name):
            batches = self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names)
        skipped = 0
        while True:
            with _readable(self._table.name):
                if (batch := next(batches, None)) is None:
                    return
                here = min(skip - skipped, batch.num_rows)
                skipped += here
                if here == batch.num_rows:
                    continue
                batch = batch.slice(here)
                # Columns come in the order of the file.
                columns = [_values(batch.column(name)) for name in names]
            yield columns, skipped, batch.num_rows
            skip = skipped = 0


def _values(column: "pyarrow.Array") -> list[Any]:
    """The values of a column as Python has them; text that is no UTF-8 keeps its bytes as they are."""
    import pyarrow  # noqa: PLC0415

    target = _json_type(column.type)
    assert target is not None, "such columns are left out"
    column = column if target == column.type else column.cast(target)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if not pyarrow.types.is_string(target):
            raise
        found = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else value.decode(errors="surrogateescape") for value in found]


def _json_type(kind: "pyarrow.DataType") -> "pyarrow.DataType | None":
    """The type that a column is read as, whose values are those of JSON, or None where there is none."""
    import pyarrow  # noqa: PLC0415

    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _json_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _json_type(kind.value_type)
    for tests, target in (
        ((types.is_boolean, types.is_integer, types.is_null), kind),
        ((types.is_floating,), pyarrow.float64()),
        ((types.is_duration,), pyarrow.int64()),
        ((types.is_string, types.is_large_string, types.is_string_view), pyarrow.string()),
        ((types.is_date, types.is_time, types.is_timestamp, types.is_decimal), pyarrow.string()),
    ):
        if any(test(kind) for test in tests):
            return target
    return _nested_type(kind)


def _nested_type(kind: "pyarrow.DataType") -> "pyarrow.DataType | None":
    import pyarrow  # noqa: PLC0415

    types = pyarrow.types
    if types.is_struct(kind):
        inside = [(field.name, _json_type(field.type)) for field in kind]
        return None if any(one is None for _, one in inside) else pyarrow.struct(inside)
    if types.is_map(kind):
        key, item = _json_type(kind.key_type), _json_type(kind.item_type)
        return None if key is None or item is None else pyarrow.map_(key, item)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _json_type(kind.value_type)
        return None if inner is None else pyarrow.list_(inner)
    return None


def _parquet() -> Any:  # noqa: ANN401 - a module
    try:
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise FoveateError('parquet needs pyarrow, which is missing: pip install "foveate[bulk]"') from None
    return pyarrow.parquet


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _parquet().ParquetFile(path) as file:
        yield file


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns what pyarrow says into one line."""
    try:
        yield
    except FoveateError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        # pyarrow's own errors are of these classes.
        why = (str(error).splitlines() or ["?"])[0]
        raise FoveateError(f"cannot read {name} as parquet: {why}") from None
