"""Prepares the arguments of a command line before a command reads them."""

import os
from collections.abc import Sequence

from cyclopts import App, ArgumentCollection

from foveate.core.errors import FoveateError

_STDIN_FLAG = "--prompts"
_TEXTS = ("prompt", "negative_prompt")


def prepared(tokens: Sequence[str]) -> list[str]:
    """The tokens, with `--prompts -` as one, as a lone hyphen would be read as a flag.

    Raises:
        FoveateError: One holds a NUL, which no file name and no prompt can.
    """
    found: list[str] = []
    for token in tokens:
        if "\0" in token:
            raise FoveateError(f"an argument holds a NUL character: {token!r}; leave it out")
        if token == "-" and found and found[-1] == _STDIN_FLAG:
            found[-1] = f"{_STDIN_FLAG}=-"
        else:
            found.append(token)
    return found


def decode_texts(_app: App, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Reads prompts as UTF-8 where the locale could not decode them, as a configuration source of cyclopts.

    Paths stay as they are: undecoded bytes are the file's name.

    Raises:
        FoveateError: A prompt is not text.
    """
    for argument in arguments:
        if argument.field_info.name in _TEXTS:
            argument.tokens[:] = [token.evolve(value=_decoded(token.value)) for token in argument.tokens]


def for_system(text: str) -> str:
    """A text from a file, as it would have come from the command line: what the locale cannot encode as bytes."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return os.fsdecode(text.encode(errors="surrogatepass"))
    return text


def _decoded(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise FoveateError(f"the prompt {text!r} is not UTF-8; set a UTF-8 locale and type it again") from None
    return text
