"""`foveate policies`: the registered methods, what can be set on each, and the presets."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.cli.console import print_facts, print_gap, print_json, print_table
from foveate.core.fields import written


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
    from foveate.policies.catalogue import all_entries, one_entry  # noqa: PLC0415 - torch is loaded when it runs

    found = all_entries() if name is None else one_entry(name)
    if options.as_json:
        print_json(found)
    elif name is None:
        _print_list(found)
    else:
        _print_one((found["policies"] + found["presets"])[0])
    return 0


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
