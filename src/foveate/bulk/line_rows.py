"""Rows of files with one row a line: prompts, and objects of JSON."""

from collections.abc import Iterator
from typing import Any

from foveate.bulk.byte_stream import ByteStream, Mark, lines
from foveate.bulk.json_values import JSON_ERRORS, content_of, first_value, why_no_json
from foveate.bulk.tables import Record
from foveate.core.prompt_file import prompt_of

_PROMPT = ("prompt",)
_UTF8_MARK = "\ufeff"


def parse_prompts(stream: ByteStream, at: Mark) -> Iterator[Record]:
    """Rows of a file of prompts; blank lines and comments are none."""
    for offset, number, line in lines(stream, at):
        # A comment may hold bytes of any kind; other lines that are no text are refused where the cell is read.
        if (prompt := prompt_of(line.decode(errors="surrogateescape"))) is not None:
            yield offset, number, _PROMPT, (prompt,)


def parse_objects(stream: ByteStream, at: Mark) -> Iterator[Record]:
    """Rows of a file with one object of JSON a line; blank lines are none."""
    for offset, number, line in lines(stream, at):
        if stripped := line.strip():
            names, values = _row(stripped)
            yield offset, number, names, values


def _row(line: bytes) -> tuple[tuple[str, ...] | None, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
    # Files that were joined have a byte order mark in the middle.
    text = text.removeprefix(_UTF8_MARK)
    try:
        value, end = first_value(text, 0)
    except JSON_ERRORS as error:
        return None, why_no_json(error)
    if end != len(text):
        return None, f"more than one object on the line, from column {end + 1} on; write one a line"
    return content_of(value)
