"""Options of a call as people write them in a command, a table or a file: names, numbers with commas, sizes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from foveate.core.errors import FoveateError
from foveate.core.schedule import BUDGETS
from foveate.pipeline.options import OPTIONS, Option, Options

Number = TypeVar("Number", int, float)


def names_of(option: Option) -> tuple[str, ...]:
    """Names of an option's flag, the first one first."""
    aliases = [name for name, other in OPTIONS.items() if other.alias_of == option.name]
    return option.flags or tuple(f"--{name.replace('_', '-')}" for name in (option.name, *aliases))


def numbers(name: str, texts: Sequence[str] | None, kind: Callable[[str], Number]) -> Number | list[Number] | None:
    """The values of an option that takes one number or several: one alone as itself, several as a list.

    Args:
        name: Said in errors, such as `--top-k`.
        texts: One number each, or several with commas.
        kind: int or float.

    Raises:
        FoveateError: One of them is not such a number.
    """
    if texts is None:
        return None
    values: list[Number] = []
    for text in ",".join(texts).split(","):
        try:
            values.append(kind(text))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise FoveateError(f"{name} must be {what}, or several with commas, got {text!r}") from None
    return values[0] if len(values) == 1 else values


def read_size(text: str, name: str = "--size") -> Options:
    """The size that a text says: pixels for a budget, or width and height.

    Args:
        text: `0.25M` or `256x256`.
        name: Said in errors.

    Raises:
        FoveateError: It is neither.
    """
    if text.upper() in BUDGETS:
        return Options(pixels=text.upper())
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise FoveateError(f"{name} must be one of {', '.join(BUDGETS)}, or WIDTHxHEIGHT in pixels, got {text!r}")
    return Options(width=int(width), height=int(height))
