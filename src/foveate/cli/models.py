"""`foveate models`: the models that have a name, how large they are and whether they are here."""

from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.cli.console import in_units, print_json, print_table
from foveate.families.packaged import DEMO_REMEDY


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ModelsOptions:
    """How the list is printed.

    Attributes:
        as_json: Print one JSON object.
    """

    as_json: Annotated[bool, Parameter(name="--json")] = False


_DEFAULTS = ModelsOptions()

_FEW = 4
"""Aspect ratios that fit into a table."""


def models(*, options: ModelsOptions = _DEFAULTS) -> int:
    """List the models by name.

    Args:
        options: How it is printed.
    """
    from foveate.cli import registered  # noqa: PLC0415 - torch is loaded when the command runs

    found = registered.all_models()
    if options.as_json:
        print_json({"models": found})
        return 0
    columns = ("model", "parameters", "default size", "weights", "trained on")
    print_table(columns, [_row(model) for model in found])
    return 0


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    if model["alias_of"] is not None:
        return (model["name"], f"the same as {model['alias_of']}", "", "", "")
    if model["parameters"] is None:
        return (model["name"], "", "", f"not installed: {DEMO_REMEDY}", "")
    width, height = model["default_size"]
    weights = in_units(model["file_bytes"], "B") + ", installed" if model["is_bundled"] else model["hub"]
    ratios = model["ratios"]
    shapes = ", ".join(ratios) if len(ratios) <= _FEW else f"{len(ratios)} aspect ratios"
    trained = f"{', '.join(model['budgets'])} pixels, {shapes}"
    return (model["name"], in_units(sum(model["parameters"].values())), f"{width}x{height}", weights, trained)
