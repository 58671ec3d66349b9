"""What two configurations say differently, in one line: for folders that go on only with the settings they have."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_NAMED = 3
"""Changes that a text names."""
_QUOTED = 60
"""Characters of a setting that it shows."""


def setting_changes(there: Mapping[str, Any], now: Mapping[str, Any], *, is_partial: bool = False) -> str:
    """The first changes between two configurations, and how many more there are; empty where there are none.

    Args:
        there: Settings of a folder, as JSON values.
        now: What is asked for, as JSON values.
        is_partial: Whether more settings will be known later, so that those that only `there` has are not compared.
    """
    found = list(_changes(there, now, is_partial=is_partial))
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _changes(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "", *, is_partial: bool) -> Iterator[str]:
    for name in dict.fromkeys((*there, *now)):
        if name not in now:
            if not is_partial:
                yield f"{prefix}{name} was {_quoted(there[name])}, is not set"
        elif name not in there:
            yield f"{prefix}{name} was not set, is {_quoted(now[name])}"
        elif isinstance(there[name], dict) and isinstance(now[name], dict):
            yield from _changes(there[name], now[name], f"{prefix}{name}.", is_partial=is_partial)
        elif there[name] != now[name]:
            yield f"{prefix}{name} was {_quoted(there[name])}, is {_quoted(now[name])}"


def _quoted(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        text = f"{len(value)} entries {text}"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
