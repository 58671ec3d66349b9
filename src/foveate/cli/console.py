"""What commands print: one JSON object, or short tables for people. Results go to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 1

_GAP, _LAST_WIDTH = 3, 20
"""Blanks between columns, and what the last column keeps at least."""


def print_json(content: Mapping[str, Any]) -> None:
    """One object on one line, with the version of its schema in front."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **content}, ensure_ascii=False) + "\n")


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    print_table((), facts)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without lines; column names in bold if there are any.

    The last column folds where the terminal ends; the others never do, as folded numbers could not be read.
    """
    from rich.console import Console  # noqa: PLC0415 - `--help` must answer without it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    body = [[Text(cell) for cell in row] for row in rows]
    if not body:
        return
    table = Table(box=None, pad_edge=False, show_header=bool(columns), header_style="bold", padding=(0, _GAP, 0, 0))
    names = columns or [""] * len(body[0])
    for index, column in enumerate(names):
        is_last = index == len(names) - 1
        table.add_column(column, no_wrap=not is_last, overflow="fold")
    for cells in body:
        table.add_row(*cells)
    widths = [max(cell.cell_len for cell in (Text(name), *cells)) for name, *cells in zip(names, *body, strict=True)]
    needed = sum(widths[:-1]) + _GAP * len(widths) + min(widths[-1], _LAST_WIDTH)
    Console(file=sys.stdout, width=max(Console(file=sys.stdout).width, needed)).print(table)


def print_gap() -> None:
    """An empty line between two tables."""
    sys.stdout.write("\n")


def print_paths(paths: Iterable[object]) -> None:
    """One path a line, never wrapped, so that other programs can read them."""
    for path in paths:
        sys.stdout.write(f"{path}\n")


def note(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"foveate: {' '.join(message.split())}\n")


def warn(message: str) -> None:
    """The same, marked as a warning."""
    note(f"warning: {message}")


def in_units(count: int | float, unit: str = "") -> str:
    """A count with three digits and a prefix, as in `1.23 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:  # noqa: PLR2004 - the step between prefixes
            return f"{count:.3g} {prefix}{unit}".strip()
        count /= 1000
    return f"{count:.3g} P{unit}"
