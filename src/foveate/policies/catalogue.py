"""Every policy and preset as plain data: what it does, its fields, and what was measured of it."""

import inspect
import sys
from dataclasses import fields
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from foveate.core.errors import unknown
from foveate.core.fields import plain, written
from foveate.core.policy import Policy
from foveate.policies.registry import PRESETS, all_policies, load_policy, provenance_of


def all_entries() -> dict[str, Any]:
    """Every policy and preset."""
    return {
        "policies": [_policy(name, policy) for name, policy in all_policies().items()],
        "presets": [_preset(name) for name in PRESETS],
    }


def one_entry(name: str) -> dict[str, Any]:
    """One policy or preset, in the same form.

    Raises:
        FoveateError: There is none of this name; the closest is named.
    """
    wanted, known = name.strip().lower().replace("_", "-"), all_policies()
    if wanted in known:
        return {"policies": [_policy(wanted, known[wanted])], "presets": []}
    if wanted in PRESETS:
        return {"policies": [], "presets": [_preset(wanted)]}
    raise unknown("policy", wanted, [*known, *PRESETS])


def _policy(name: str, policy: type[Policy]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _first_line(inspect.getdoc(sys.modules[policy.__module__]) or ""),
        "details": _plain_text(inspect.getdoc(policy) or ""),
        "fields": _fields(policy, {f.name: f.default for f in fields(policy)}),
    }


def _preset(name: str) -> dict[str, Any]:
    policy, measured = load_policy(name), provenance_of(name)
    assert measured is not None, "every preset says where it comes from"
    return {
        "name": name,
        "spec": policy.spec,
        "summary": measured.summary,
        "details": " | ".join(_plain_text(inspect.getdoc(type(part)) or "") for part in policy.parts_of()),
        "fields": [field for part in policy.parts_of() for field in _fields(type(part), part.settings())],
        "provenance": {
            "bound": list(measured.bound),
            "model": measured.model,
            "sha256": measured.sha256,
            "command": measured.command,
            **measured.rest,
        },
    }


def _fields(policy: type[Policy], values: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = get_type_hints(policy)
    return [{"name": f.name, "type": _type(kinds[f.name]), "default": plain(values[f.name])} for f in fields(policy)]


def _type(kind: Any) -> str:
    """A field's type in a word."""
    inside = get_args(kind)
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if one is Ellipsis else _type(one) for one in inside)}]"
    if get_origin(kind) is Literal:
        return " | ".join(written(choice) for choice in inside)
    if inside:
        return " | ".join(_type(choice) for choice in inside)
    if issubclass(kind, Enum):
        return " | ".join(written(choice) for choice in kind)
    return "null" if kind is NoneType else str(kind.__name__)


def _first_line(text: str) -> str:
    return _plain_text(text.partition("\n")[0])


def _plain_text(text: str) -> str:
    """One line without marks of code."""
    return " ".join(text.replace("`", "").split())
