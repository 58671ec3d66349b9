"""Values of single cells: of a text by the option's type, of JSON and parquet by what they are.

A reader takes the cell's value and gives what the row says, or None where the cell counts as absent: an empty text in
tables of texts, a NaN, and null, which no reader is asked about.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, SupportsFloat

from foveate.core.errors import FoveateError
from foveate.pipeline.option_texts import numbers, read_size
from foveate.pipeline.options import Option, Options, is_number, is_whole

Reader = Callable[[Any], Any]
"""Reads the value of a cell; raises FoveateError where it is none."""

_LONGEST_QUOTE = 60
"""Characters of a value that an error quotes."""

_DEEPEST = 32
"""Lists and objects within each other that a column may hold."""

_SIZES = 256
"""Sizes that are remembered."""

_EXACT = 2**53
"""Up to here a float64 holds every whole number; tables write whole numbers as floats where a cell is absent."""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
_SWITCHES = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


def prompt_reader(column: str) -> Reader:
    """Reads a prompt as it is; a blank one is absent, and a whole number is the index of a class."""

    def read(value: object) -> str | None:
        return _not_blank(str(value) if _is_whole(value) else _text(column, value))

    return _quick_text(read)


def id_reader(column: str) -> Reader:
    """Reads an id: a text or a whole number."""

    def read(value: object) -> str | None:
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, float) and is_whole_float(value):
            value = int(value)
        return _not_blank(str(value) if _is_whole(value) else _text(column, value, "a text or a whole number"))

    return _quick_text(read)


def size_reader(column: str) -> Reader:
    """Reads a size, `0.25M` or `256x256`."""
    known = lru_cache(maxsize=_SIZES)(partial(read_size, name=column))

    def read(value: object) -> Options | None:
        text = _text(column, value).strip()
        return known(text) if text else None

    return read


def option_reader(option: Option, column: str, *, are_texts: bool) -> Reader:
    """Reads what an option's column says.

    Args:
        option: What the column says.
        column: Its own name.
        are_texts: Whether every cell is a text, as in csv; it is then read as a flag's value is.
    """
    one = partial(_from_text if are_texts else _typed, option, column)
    several = one
    if option.per_scale:
        several = partial(_several_from_text, option, column, one) if are_texts else partial(_several, column, one)
    if option.reads is str:
        return _quick_text(several)
    return several if are_texts or option.reads is bool else _quick_number(option.reads, several)


def extra_reader(column: str, *, are_texts: bool) -> Reader:
    """Reads a value that is only carried along, as JSON has it; a NaN is absent, and an empty text in csv."""

    def read(value: object) -> Any:  # noqa: ANN401 - any JSON value
        found = _json_value(column, value, _DEEPEST)
        return None if are_texts and not found else found

    return _quick_text(read)


def _quick_text(read: Reader) -> Reader:
    """The same reader, faster for the texts that nearly all cells hold."""

    def quick(value: Any) -> Any:  # noqa: ANN401 - as a cell has it
        if type(value) is str and value.isascii() and "\0" not in value and value and not value.isspace():
            return value
        return read(value)

    return quick


def _quick_number(kind: type, read: Reader) -> Reader:
    """The same reader, faster for numbers of the right type."""

    def quick(value: Any) -> Any:  # noqa: ANN401 - as a cell has it
        # A NaN is the only number that differs from itself.
        return value if type(value) is kind and value == value else read(value)  # noqa: PLR0124

    return quick


def _not_blank(text: str) -> str | None:
    return None if text.isspace() or not text else text


def plain_text(column: str, text: str) -> str:
    """The text, if it can be stored.

    Raises:
        FoveateError: It holds a NUL, or characters that UTF-8 has not.
    """
    if "\0" in text:
        raise FoveateError(f"{column} holds a NUL; save the file as text in UTF-8")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            # Bytes that are no UTF-8 come as such codes.
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"  # noqa: PLR2004
            raise FoveateError(f"{column} is not UTF-8 ({what}); save the file as UTF-8") from None
    return text


def quoted(value: object) -> str:
    """A value as errors quote it, shortened."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."


def is_whole_float(value: object) -> bool:
    """Whether a float stands for a whole number, exactly."""
    return isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT


def _is_whole(value: object) -> bool:
    return is_whole(value) and not isinstance(value, bool)


def _text(column: str, value: object, what: str = "a text") -> str:
    if not isinstance(value, str):
        raise _wrong(column, what, value)
    return plain_text(column, value)


def _wrong(column: str, what: str, value: object) -> FoveateError:
    return FoveateError(f"{column} must be {what}, got {quoted(value)}")


def _json_value(column: str, value: object, depth: int) -> Any:  # noqa: ANN401 - as above
    if isinstance(value, float):
        if math.isinf(value):
            raise FoveateError(f"{column} holds {value}, which JSON cannot; write null or a text")
        return None if math.isnan(value) else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return plain_text(column, value)
    if not depth:
        raise FoveateError(f"{column} holds lists or objects more than {_DEEPEST} deep; make it flat")
    if isinstance(value, list | tuple):
        return [_json_value(column, entry, depth - 1) for entry in value]
    if isinstance(value, dict):
        return {plain_text(column, str(key)): _json_value(column, one, depth - 1) for key, one in value.items()}
    raise FoveateError(f"{column} holds {quoted(value)}, which JSON cannot; leave it out")


def _typed(option: Option, column: str, value: object) -> Any:  # noqa: ANN401 - of the option's type
    """A value of JSON or parquet, which has a type."""
    if isinstance(value, float) and math.isnan(value):
        return None
    kind = option.reads
    if kind is str:
        is_number_too = option.takes(SupportsFloat) and is_number(value) and not isinstance(value, bool)
        # An empty text is how tables write that there is none.
        return value if is_number_too else _not_blank(_text(column, value))
    if (found := _of_kind(kind, value)) is None:
        raise _wrong(column, _WORDS[kind], value)
    return found


def _of_kind(kind: type, value: object) -> bool | int | float | None:
    """The value as a bool, int or float, or None if it is none."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int and isinstance(value, float):
        return int(value) if is_whole_float(value) else None
    return value if is_number(value) and (kind is float or is_whole(value)) else None


def _several(column: str, one: Reader, value: object) -> Any:  # noqa: ANN401 - as above
    """One value, or a list with one per scale."""
    if not isinstance(value, list | tuple):
        return one(value)
    found = [None if entry is None else one(entry) for entry in value]
    if not found or None in found:
        raise _wrong(column, "one number, or one per scale", value)
    return found


def _from_text(option: Option, column: str, value: str) -> Any:  # noqa: ANN401 - as above
    if option.reads is str:
        return _not_blank(plain_text(column, value))
    text = value.strip()
    if not text:
        return None
    if option.reads is bool:
        if (switch := _SWITCHES.get(text.lower())) is None:
            raise _wrong(column, _WORDS[bool], value)
        return switch
    return _number(option, column, text)


def _several_from_text(option: Option, column: str, one: Reader, value: str) -> Any:  # noqa: ANN401 - as above
    return numbers(column, [value], _whole if option.reads is int else float) if "," in value else one(value)


def _number(option: Option, column: str, text: str) -> int | float | None:
    try:
        number = _whole(text) if option.reads is int else float(text)
    except ValueError:
        if text.lower() == "nan":
            return None
        raise _wrong(column, _WORDS[option.reads], text) from None
    return None if math.isnan(number) else number


def _whole(text: str) -> int:
    """An int, also where a table wrote it as `7.0`."""
    try:
        return int(text)
    except ValueError:
        if is_whole_float(number := float(text)):
            return int(number)
        raise
