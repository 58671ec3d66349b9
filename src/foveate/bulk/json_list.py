"""Rows of a JSON file that is one list of objects, read entry by entry: the list is never in memory as a whole."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

from foveate.bulk.byte_stream import BLOCK_BYTES, MAX_ROW_BYTES, ByteStream, Mark
from foveate.bulk.json_values import JSON_ERRORS, content_of, lenient_value, why_no_json
from foveate.bulk.tables import Record
from foveate.core.errors import FoveateError

_BLANK = re.compile(r"[ \t\r\n]*")


def parse_list(stream: ByteStream, at: Mark) -> Iterator[Record]:
    """Rows from a mark on.

    Raises:
        FoveateError: The file is no list, or is no JSON from some entry on.
    """
    window = _Window(stream, at)
    if at.offset == 0 and not window.open_list():
        return
    number = at.number
    while True:
        offset, value = window.entry(number)
        names, values = content_of(value)
        yield offset, number, names, values
        number += 1
        if not window.has_more(number):
            return


class _Window:
    """The part of the text that is being read."""

    def __init__(self, stream: ByteStream, at: Mark) -> None:
        self._stream, self._text, self._position = stream, "", 0
        # Bytes that are no UTF-8 become characters that are refused in the cell where they stand.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._offset, self._counted = at.offset, 0

    def open_list(self) -> bool:
        """Steps into the list, and says whether it has an entry."""
        self._peek()
        if self._text.startswith("\ufeff"):
            self._position = 1
        if (found := self._peek()) != "[":
            hint = "an object a line is .jsonl" if found == "{" else "it must begin with ["
            what = "is not a list of objects" if found else "is empty"
            raise FoveateError(f"{self._stream.name} {what}; {hint}")
        self._position += 1
        if self._peek() != "]":
            return True
        self._position += 1
        self._close()
        return False

    def entry(self, number: int) -> tuple[int, Any]:
        """Offset and value of the next entry, and steps behind it."""
        self._peek()
        while True:
            try:
                value, end = lenient_value(self._text, self._position)
            except JSON_ERRORS as error:
                if isinstance(error, RecursionError) or not self._read_on():
                    raise self._broken(number, why_no_json(error)) from None
                continue
            # A number may go on in the next block.
            if end < len(self._text) or not self._read_on():
                break
        offset = self._count()
        self._position = end
        return offset, value

    def has_more(self, number: int) -> bool:
        """Steps over the comma behind an entry; False at the end of the list."""
        found = self._peek()
        self._position += 1
        if found == "]":
            self._close()
        elif found != ",":
            raise self._broken(number - 1, "a comma or ] is missing behind it")
        return found == ","

    def _close(self) -> None:
        if self._peek():
            raise FoveateError(f"{self._stream.name} goes on behind its list; an object a line is .jsonl")

    def _broken(self, number: int, why: str) -> FoveateError:
        return FoveateError(
            f"{self._stream.name} entry {number}: {why}; mend the file, or write one object a line (.jsonl), where "
            "only that line would be lost"
        )

    def _peek(self) -> str:
        """The next character that is not blank, and steps to it; empty at the end."""
        while True:
            self._position = _BLANK.match(self._text, self._position).end()  # type: ignore[union-attr]  # it matches
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def _count(self) -> int:
        """The offset of the position in bytes."""
        self._offset += len(self._text[self._counted : self._position].encode(errors="surrogateescape"))
        self._counted = self._position
        return self._offset

    def _read_on(self) -> bool:
        """Reads as much again as there is, without what is done; False at the end of the file."""
        self._count()
        rest = self._text[self._position :]
        if len(rest) > MAX_ROW_BYTES:
            return False
        block = self._stream.read(max(BLOCK_BYTES, len(rest)))
        self._text, self._position, self._counted = rest + self._decoder.decode(block, final=not block), 0, 0
        return bool(block)
