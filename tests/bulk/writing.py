"""Writes the same rows in every format, for tests of inputs."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from foveate.bulk.rows import BadRow, Row
from foveate.bulk.sources import Source

Cells = dict[str, Any]


def as_text(rows: Sequence[Cells]) -> bytes:
    return "".join(f"{row['prompt']}\n" for row in rows).encode()


def as_lines(rows: Sequence[Cells]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def as_list(rows: Sequence[Cells]) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False).encode()


def as_csv(rows: Sequence[Cells], separator: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names, delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: Sequence[Cells]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out, row_group_size=40)
    return out.getvalue()


WRITERS: dict[str, Callable[[Sequence[Cells]], bytes]] = {
    "rows.txt": as_text,
    "rows.jsonl": as_lines,
    "rows.ndjson": as_lines,
    "rows.json": as_list,
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.parquet": as_parquet,
    "rows.txt.gz": lambda rows: gzip.compress(as_text(rows)),
    "rows.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "rows.json.gz": lambda rows: gzip.compress(as_list(rows)),
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "rows.tsv.gz": lambda rows: gzip.compress(as_csv(rows, "\t")),
}
"""Every format, by the name of its file."""


def put(folder: Path, name: str, content: bytes | str) -> Path:
    """Writes a file, and says where."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def all_rows(source: Source) -> list[Row | BadRow]:
    """Every row of an input that has fewer than a million."""
    return list(source.read(0, 10**6))
