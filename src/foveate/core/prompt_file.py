"""Prompts from a text file, one a line."""

from pathlib import Path

from foveate.core.errors import FoveateError


def read_prompt_file(path: Path) -> list[str]:
    """The lines that are not empty, without blanks around them; never none.

    Raises:
        FoveateError: The file cannot be read or has no such line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise FoveateError(f"cannot read prompts from {path}: it is not a text file in UTF-8") from None
    except OSError as error:
        raise FoveateError(f"cannot read prompts from {path}: {error.strerror}") from None
    found = [line for line in lines if line]
    if not found:
        raise FoveateError(f"{path} has no prompts; write one a line")
    return found
