"""`foveate policies`: the registered methods, what can be set on each, and the presets."""

import inspect
import sys
from dataclasses import dataclass, fields
from enum import Enum
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from foveate.cli.console import print_facts, print_gap, print_json, print_table
from foveate.core.errors import unknown
from foveate.core.fields import plain, written

if TYPE_CHECKING:
    # Named in full in annotations, which the tests check: they import what stands there.
    import foveate.core.policy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class PoliciesOptions:
    """How the list is printed.

    Attributes:
        as_json: Print one JSON object.
    """

    as_json: Annotated[bool, Parameter(name="--json")] = False


_DEFAULTS = PoliciesOptions()


def policies(name: str | None = None, /, *, options: PoliciesOptions = _DEFAULTS) -> int:
    """List the policies, their fields and presets.

    Args:
        name: A policy or preset to show in detail.
        options: How it is printed.
    """
    found = _all_entries() if name is None else _one_entry(name)
    if options.as_json:
        print_json(found)
    elif name is None:
        _print_list(found)
    else:
        _print_one((found["policies"] + found["presets"])[0])
    return 0


def _all_entries() -> dict[str, Any]:
    """Every policy and preset."""
    from foveate.policies.registry import PRESETS, all_policies  # noqa: PLC0415 - torch is loaded when it runs

    return {
        "policies": [_policy(name, policy) for name, policy in all_policies().items()],
        "presets": [_preset(name) for name in PRESETS],
    }


def _one_entry(name: str) -> dict[str, Any]:
    """One policy or preset, in the same form.

    Raises:
        FoveateError: There is none of this name; the closest is named.
    """
    from foveate.policies.registry import PRESETS, all_policies  # noqa: PLC0415

    wanted, known = name.strip().lower().replace("_", "-"), all_policies()
    if wanted in known:
        return {"policies": [_policy(wanted, known[wanted])], "presets": []}
    if wanted in PRESETS:
        return {"policies": [], "presets": [_preset(wanted)]}
    raise unknown("policy", wanted, [*known, *PRESETS])


def _policy(name: str, policy: type["foveate.core.policy.Policy"]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _first_line(inspect.getdoc(sys.modules[policy.__module__]) or ""),
        "details": _plain_text(inspect.getdoc(policy) or ""),
        "fields": _fields(policy, {f.name: f.default for f in fields(policy)}),
    }


def _preset(name: str) -> dict[str, Any]:
    from foveate.policies.registry import load_policy, provenance_of  # noqa: PLC0415

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


def _fields(policy: type["foveate.core.policy.Policy"], values: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = get_type_hints(policy)
    return [{"name": f.name, "type": _type(kinds[f.name]), "default": plain(values[f.name])} for f in fields(policy)]


def _type(kind: Any) -> str:  # noqa: ANN401 - an annotation
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


def _print_list(found: dict[str, Any]) -> None:
    rows = [(p["name"], p["summary"], ", ".join(_setting(f) for f in p["fields"])) for p in found["policies"]]
    print_table(("policy", "what it does", "fields and defaults"), rows)
    print_gap()
    print_table(("preset", "stands for", "what for"), [(p["name"], p["spec"], p["summary"]) for p in found["presets"]])


def _print_one(entry: dict[str, Any]) -> None:
    facts = [("name", entry["name"])]
    facts += [("spec", entry["spec"])] if "spec" in entry else []
    facts += [("what it does", entry["summary"]), ("in detail", entry["details"])]
    print_facts([*facts, *(_measured(entry["provenance"]) if "provenance" in entry else [])])
    print_gap()
    print_table(("field", "type", "default"), [(f["name"], f["type"], written(f["default"])) for f in entry["fields"]])


def _measured(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """What a preset keeps, on which model, and how that was measured."""
    bound, model, sha256 = provenance["bound"], provenance["model"], provenance["sha256"]
    facts = [("keeps", " and ".join(bound) if bound else "no bound was measured")]
    facts += [("on", model if sha256 is None else f"{model}, weights {sha256[:12]}")] if model is not None else []
    rest = {name: value for name, value in provenance.items() if name not in ("bound", "model", "sha256", "command")}
    facts += [(name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
              for name, value in rest.items()]  # fmt: skip
    return [*facts, *([("measured by", provenance["command"])] if provenance["command"] is not None else [])]


def _setting(field: dict[str, Any]) -> str:
    return f"{field['name']}={written(field['default'])}"
