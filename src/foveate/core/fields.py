"""Fields of a policy as text and as plain data: written into specs, YAML and image files, and read back by their types.

A field may be a number, a text, a switch, a choice (`Literal` or an enum), a tuple of these, or one of several of them,
None included.
"""

import json
import re
from contextlib import suppress
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

import yaml

from foveate.core.errors import FoveateError

_BARE = re.compile(r"[\w.+/-]+( [\w.+/-]+)*")
"""Texts that stand in a spec without quotes."""

_NONE = "null"
_LATER = (float, str, NoneType)
"""Where a value may be several things, those that are tried last, in this order: most texts would do."""


def plain(value: object) -> Any:  # noqa: ANN401 - whatever a field holds
    """A field's value as JSON and YAML have it: of an enum its value, and a list for a tuple."""
    if isinstance(value, Enum):
        return plain(value.value)
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def written(value: object, *, is_nested: bool = False) -> str:
    """A field's value as specs have it: `0.5`, `true`, `null`, `[1,2]`; a text in quotes where it needs them."""
    value = plain(value)
    if isinstance(value, list):
        return f"[{','.join(written(entry, is_nested=True) for entry in value)}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    is_bare = not isinstance(value, str) or (not is_nested and value != _NONE and _BARE.fullmatch(value) is not None)
    return str(value) if is_bare else json.dumps(value, ensure_ascii=False)


def split(text: str, separator: str) -> list[str]:
    """The parts of a spec between separators that stand in no quotes and no brackets."""
    parts, depth, is_quoted, is_escaped = [""], 0, False, False
    for char in text:
        if char == separator and not depth and not is_quoted:
            parts.append("")
            continue
        parts[-1] += char
        is_quoted ^= char == '"' and not is_escaped
        is_escaped = char == "\\" and not is_escaped
        depth += 0 if is_quoted else (char == "[") - (char == "]")
    return parts


def parsed(text: str) -> Any:  # noqa: ANN401 - as above
    """What `written` wrote; a bare text stays one, as the field's type says what it means."""
    text = text.strip()
    if text == _NONE:
        return None
    if not text.startswith(("[", '"')):
        return text
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            # A few letters of them stand for billions of entries.
            raise ValueError("an alias")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise FoveateError(f'{text} is not written as a list such as [1,2] or a text in quotes such as "a"') from None


def typed(kind: Any, value: object) -> Any:  # noqa: ANN401 - as above
    """A value of a field's type, from a text or from plain data.

    Raises:
        ValueError: There is none.
        FoveateError: A field cannot have this type.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in sorted(inside, key=lambda one: _LATER.index(one) if one in _LATER else -1):
            with suppress(ValueError):
                return typed(choice, value)
        raise ValueError(value)
    if origin is tuple:
        return _tuple(inside, value)
    if origin is Literal:
        return _choice(inside, value)
    return _choice(tuple(kind), value) if issubclass(kind, Enum) else _single(kind, value)


def _tuple(kinds: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    return tuple(typed(kind, entry) for kind, entry in zip(kinds, value, strict=True))


def _choice(choices: tuple[Any, ...], value: object) -> Any:  # noqa: ANN401 - as above
    for choice in choices:
        stored = plain(choice)
        if value is choice or value == written(choice) or (value == stored and type(value) is type(stored)):
            return choice
    raise ValueError(value)


def _single(kind: type, value: object) -> Any:  # noqa: ANN401 - as above
    is_text = isinstance(value, str)
    if kind is bool and is_text:
        value = {"true": True, "false": False}.get(str(value).lower())
    elif kind is NoneType and is_text:
        value = None if str(value).lower() in ("none", _NONE) else value
    elif kind in (int, float) and (is_text or type(value) is int):
        value = kind(cast(str | int, value))
    elif kind not in (bool, int, float, str, NoneType):
        raise FoveateError(f"a field of type {kind.__name__} cannot be written into a spec")
    if type(value) is not kind:
        raise ValueError(value)
    return value


def words(kind: Any) -> str:  # noqa: ANN401 - as above
    """What a value of a type must be, for errors and lists: `a float or null`."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(words(choice) for choice in inside)
    if origin is tuple:
        entries = ["..." if one is Ellipsis else re.sub("^an? ", "", words(one)) for one in inside]
        return f"a list [{', '.join(entries)}]"
    choices = inside if origin is Literal else tuple(kind) if issubclass(kind, Enum) else ()
    if choices:
        return " or ".join(written(choice) for choice in choices)
    return {bool: "true or false", NoneType: _NONE, str: "a text", int: "an int"}.get(kind, f"a {kind.__name__}")
