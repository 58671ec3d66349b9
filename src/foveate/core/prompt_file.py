r"""Prompts from a text file or stdin, one a line.

Blank lines are left out, and so are comments, which begin with `#`. A prompt that begins with `#` is written `\#`.
"""

import re
import sys
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.core.text_file import decode_text, lines_of, read_text

STDIN = Path("-")
"""Stands for stdin; a file of this name is read through its absolute path."""

_ESCAPED = re.compile(r"\\(\\*#)")
"""The beginning of a line whose first backslash says that it is not a comment."""


def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a file, stripped; at least one.

    Args:
        path: UTF-8, with or without a byte order mark, or UTF-16 with one; `-` reads stdin to its end.

    Raises:
        FoveateError: The file cannot be read, is not text, or has no prompt.
    """
    is_stdin = Path(path) == STDIN
    name = "stdin" if is_stdin else str(path)
    text = decode_text(_read_stdin(), "prompts from stdin") if is_stdin else read_text(path, "prompts from")
    found: list[str] = []
    for number, line in enumerate(lines_of(text), start=1):
        if "\0" in line:
            raise FoveateError(f"cannot read prompts from {name}: line {number} holds a NUL; save it as text in UTF-8")
        if (prompt := prompt_of(line)) is not None:
            found.append(prompt)
    if not found:
        raise FoveateError(f"{name} has no prompts; write one a line (a line that begins with # is a comment)")
    return found


def prompt_of(line: str) -> str | None:
    """The prompt of a line, stripped, or None where the line is blank or a comment."""
    # Files that were joined have a byte order mark in the middle.
    prompt = line.replace("\ufeff", "").strip()
    if not prompt or prompt.startswith("#"):
        return None
    return _ESCAPED.sub(r"\1", prompt) if _ESCAPED.match(prompt) else prompt


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise FoveateError("cannot read prompts from stdin: it is closed; pipe them in, or name a file")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise FoveateError(f"cannot read prompts from stdin: {error.strerror or error}") from None
