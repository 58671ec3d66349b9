"""Text files as editors write them: UTF-8 with or without a byte order mark, UTF-16 or UTF-32 with one."""

import codecs
from pathlib import Path

from foveate.core.errors import FoveateError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the codecs that take them off. The mark of UTF-32 begins with that of UTF-16."""


def read_text(path: str | Path, what: str) -> str:
    """The text of a file.

    Args:
        path: Where.
        what: Said in front of the path in errors, such as `the configuration`.

    Raises:
        FoveateError: The file cannot be read, or holds bytes that are no text; the line is named.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FoveateError(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        # A path with a NUL character, or one that the locale cannot encode.
        raise FoveateError(f"cannot read {what} {path!r}: {error}") from None
    return decode_text(data, f"{what} {path}")


def decode_text(data: bytes, what: str) -> str:
    """The text that bytes stand for, without its byte order mark.

    Args:
        data: All bytes of a file or stream.
        what: Said in errors, such as `prompts from stdin`.

    Raises:
        FoveateError: The bytes are no such text; the first line with such bytes is named.
    """
    codec = codec_of(data)
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        # The codec that takes a mark off counts from behind it.
        seen = error.object
        line = len(lines_of(seen[: error.start].decode(codec, errors="ignore")))
        found = f"byte 0x{seen[error.start]:02x}" if error.start < len(seen) else "an incomplete character"
        name = codec.removesuffix("-sig").upper()
        raise FoveateError(f"cannot read {what}: line {line} is not {name} ({found}); save it as UTF-8") from None


def codec_of(data: bytes) -> str:
    """The codec that the beginning of a file asks for by its byte order mark; it takes the mark off."""
    return next((codec for mark, codec in _MARKS if data.startswith(mark)), "utf-8")


def lines_of(text: str) -> list[str]:
    """Lines as editors count them, ended by LF, CRLF or CR; other separators of Unicode are part of a line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
