"""Shards as parquet files: the fields of the manifest as columns, and `image`, which Hugging Face datasets shows.

The field `image` of the manifest, which of a row's images it is, is the column `image_index`. Fields with no fixed
shape (`warnings`, `extra`) are JSON texts, so all shards of all runs have one schema.
Source: the feature `Image` of https://github.com/huggingface/datasets, a struct of bytes and path.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from foveate.bulk.manifest import FIELDS, Item
from foveate.bulk.tar_shards import SUFFIXES
from foveate.core.errors import FoveateError

_GROUP_ROWS = 100
"""Images of a row group, as the viewer of the hub likes them."""
_GROUP_BYTES = 32 * 2**20
"""Of images, after which a row group ends early: what a reader and the writer hold in memory."""

_HF_TYPES = {"int": "int64", "float": "float64", "text": "string", "json": "string"}


def refuse_missing_pyarrow() -> None:
    """Says how to install what parquet needs.

    Raises:
        FoveateError: It is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise FoveateError('parquet shards need pyarrow: pip install "foveate[bulk]", or write tar shards') from None


def write_parquet(file: BinaryIO, items: Iterable[Item]) -> None:
    """Writes a shard; one row group is in memory at a time.

    Args:
        file: Empty, open for writing.
        items: Images, in the order in which they are to stand there.

    Raises:
        OSError: It cannot be written.
        FoveateError: pyarrow is not installed.
    """
    refuse_missing_pyarrow()
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    schema = _schema()
    # Images are compressed, and no two are equal: dictionaries and statistics of them would only take room.
    plain = [*(name for name in schema.names if name != "image")]
    codecs = {**dict.fromkeys(plain, "zstd"), "image.bytes": "none", "image.path": "zstd"}
    writer = pq.ParquetWriter(file, schema, compression=codecs, use_dictionary=plain, write_statistics=plain)
    try:
        for group in _groups(items):
            writer.write_table(_table(group, schema))
    except BaseException:
        # Its own close would write a footer under half a table, and again when it is collected.
        writer.is_open = False
        raise
    writer.close()


class ParquetImages:
    """Images of a published shard by key; the row group of the last one is in memory, no file stays open."""

    def __init__(self, path: Path) -> None:
        """Reads what is where.

        Raises:
            FoveateError: It cannot be read, or pyarrow is not installed.
        """
        refuse_missing_pyarrow()
        self._path = path
        self._group: tuple[int, list[bytes]] = (-1, [])
        keys = [self._read(group, "key") for group in range(self._num_groups())]
        self._places = {key: (group, row) for group, names in enumerate(keys) for row, key in enumerate(names)}

    def content(self, key: str) -> bytes | None:
        """An image, unchecked; None where there is none of this key.

        Raises:
            FoveateError: The file cannot be read.
        """
        if key not in self._places:
            return None
        group, row = self._places[key]
        if self._group[0] != group:
            self._group = (group, self._read(group, "image.bytes"))
        return self._group[1][row]

    def _num_groups(self) -> int:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

        try:
            return int(pq.read_metadata(self._path).num_row_groups)
        except (OSError, pa.ArrowException) as error:
            raise FoveateError(f"cannot read {self._path}: {error}; restore it from a copy") from None

    def _read(self, group: int, column: str) -> list[Any]:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

        try:
            with pq.ParquetFile(self._path) as file:
                table = file.read_row_group(group, columns=[column])
        except (OSError, pa.ArrowException) as error:
            raise FoveateError(f"cannot read {self._path}: {error}; restore it from a copy") from None
        values = table.column(0)
        if column == "image.bytes":
            values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks])
        return list(values.to_pylist())


def _schema() -> Any:  # noqa: ANN401 - pyarrow.Schema
    """Columns of all shards, with what Hugging Face datasets reads them as."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    types = {"int": pa.int64(), "float": pa.float64(), "text": pa.string(), "json": pa.string()}
    fields = [pa.field(_column(name), types[type_]) for name, type_ in FIELDS.items()]
    image = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))
    features: dict[str, Any] = {
        _column(name): {"dtype": _HF_TYPES[type_], "_type": "Value"} for name, type_ in FIELDS.items()
    }
    told = {"info": {"features": {**features, "image": {"_type": "Image"}}}}
    return pa.schema([*fields, image], metadata={"huggingface": json.dumps(told)})


def _column(name: str) -> str:
    return "image_index" if name == "image" else name


def _groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    group: list[Item] = []
    held = 0
    for item in items:
        size = len(item.content or b"")
        if group and (len(group) == _GROUP_ROWS or held + size > _GROUP_BYTES):
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    if group:
        yield group


def _table(group: list[Item], schema: Any) -> Any:  # noqa: ANN401 - of pyarrow
    import pyarrow as pa  # noqa: PLC0415 - an extra

    columns = [[_cell(item.entry.get(name), type_) for item in group] for name, type_ in FIELDS.items()]
    images = [
        {"bytes": item.content, "path": f"{item.entry['key']}.{SUFFIXES[item.entry['format']]}"} for item in group
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(chain(columns, [images]), schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _cell(value: Any, type_: str) -> Any:  # noqa: ANN401 - a JSON value
    if value is None:
        return None
    if type_ == "json":
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    # Half of a surrogate pair has no place in UTF-8.
    return value.encode(errors="replace").decode() if type_ == "text" else value
