"""What commands print: one JSON object, or short tables for people. Results go to stdout, everything else to stderr."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 1

_GAP, _LAST_WIDTH = 3, 20
"""Blanks between columns, and what the last column keeps at least."""

_NOTE_LENGTH, _NOTE_END = 2000, 500
"""Characters of a line on stderr at most, and how many of them are its end, where the remedy is."""


def print_json(content: Mapping[str, Any]) -> None:
    """One object on one line, with the version of its schema in front; in ASCII where stdout cannot encode it."""
    text = readable(json.dumps({"schema_version": SCHEMA_VERSION, **content}, ensure_ascii=False))
    if not _can_print(text):
        text = json.dumps(json.loads(text))
    sys.stdout.write(f"{text}\n")


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

    body = [[Text(readable(cell)) for cell in row] for row in rows]
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
    """One path a line, never wrapped, so that other programs can read them.

    A path that stdout cannot encode is written in the bytes that the system has for it, as `ls` does.
    """
    for path in paths:
        text = f"{path}\n"
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is None or _can_print(text):
            sys.stdout.write(text)
        else:
            sys.stdout.flush()
            buffer.write(os.fsencode(text))


def note(message: str) -> None:
    """One line on stderr; what would move the cursor is escaped, and what is much too long loses its middle."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], " ".join(readable(message).split()))
    if len(line) > _NOTE_LENGTH:
        line = f"{line[: _NOTE_LENGTH - _NOTE_END]} [...] {line[-_NOTE_END:]}"
    sys.stderr.write(f"foveate: {line}\n")


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


def readable(text: str) -> str:
    """The text; bytes in it that the locale could not decode are read as UTF-8 where that is possible."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text


def _can_print(text: str) -> bool:
    """Whether stdout has every character of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
