"""The registered policies as plain data, read from their classes."""

import inspect
import sys
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from foveate.core.errors import unknown
from foveate.core.policy import Policy
from foveate.policies.registry import PRESETS, all_policies, load_policy


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
    spec, summary = PRESETS[name]
    policy = load_policy(spec)
    return {
        "name": name,
        "spec": spec,
        "summary": summary,
        "details": _plain_text(inspect.getdoc(type(policy)) or ""),
        "fields": _fields(type(policy), policy.settings()),
    }


def _fields(policy: type[Policy], values: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = get_type_hints(policy)
    return [{"name": f.name, "type": _kind(kinds[f.name]), "default": values[f.name]} for f in fields(policy)]


def _kind(annotation: object) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return " | ".join(_kind(choice) if isinstance(choice, type) else str(choice) for choice in get_args(annotation))


def _first_line(text: str) -> str:
    return _plain_text(text.partition("\n")[0])


def _plain_text(text: str) -> str:
    """One line without marks of code."""
    return " ".join(text.replace("`", "").split())
