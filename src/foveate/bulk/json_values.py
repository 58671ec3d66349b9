"""Values of JSON, one at a time; an object that names a key twice is told from one that does not."""

import json
from dataclasses import dataclass
from typing import Any

JSON_ERRORS = (ValueError, RecursionError)
"""What `first_value` raises where there is no value."""


@dataclass(frozen=True, slots=True)
class _Repeated:
    """An object with a key that is there twice, one of whose values would be lost."""

    key: str

    def __repr__(self) -> str:
        return f"an object with the key {self.key!r} twice"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    return _Repeated(next(name for name in names if names.count(name) > 1))


first_value = json.JSONDecoder(object_pairs_hook=_object).raw_decode
"""The value that begins at a position of a text, and where it ends; raises one of `JSON_ERRORS`."""


lenient_value = json.JSONDecoder(object_pairs_hook=_object, strict=False).raw_decode
"""The same; characters of control may stand in texts, to be refused in the row where they do."""


def why_no_json(error: BaseException) -> str:
    """What to say of text that is no JSON, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.pos + 1}"
    return "not JSON: lists or objects are too deep" if isinstance(error, RecursionError) else f"not JSON: {error}"


def content_of(value: object) -> tuple[tuple[str, ...] | None, Any]:
    """Names and values of an object; no names and the reason of anything else."""
    if isinstance(value, dict):
        return tuple(value), tuple(value.values())
    if isinstance(value, _Repeated):
        return None, f"the key {value.key!r} is there twice; leave one out"
    return None, f'a row must be an object such as {{"prompt": "a cat"}}, got {_kind(value)}'


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
