"""`foveate models`: the models that have a name, how large they are and whether they are here."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from foveate.cli.console import in_units, print_json, print_table
from foveate.families.packaged import DEMO_REMEDY

if TYPE_CHECKING:
    from foveate.families.spec import ModelSpec


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
    found = all_models()
    if options.as_json:
        print_json({"models": found})
        return 0
    columns = ("model", "parameters", "default size", "weights", "trained on")
    print_table(columns, [_row(model) for model in found])
    return 0


def all_models() -> list[dict[str, Any]]:
    """Every name: models of installed packages, the demonstration models that are not installed, published models."""
    from foveate.families.packaged import DEMO_NAMES, packaged_models  # noqa: PLC0415 - torch is loaded here
    from foveate.families.published import ALIASES, PUBLISHED  # noqa: PLC0415

    packaged = packaged_models()
    missing = [name for name in DEMO_NAMES if name not in packaged]
    published = [
        _entry(name, entry.spec, None) | {"hub": entry.transformer.repo, "licence": entry.licence}
        for name, entry in PUBLISHED.items()
    ]
    aliases = [_describe(alias, alias_of=name) for alias, name in ALIASES.items()]
    own = [_packaged(name, folder) for name, folder in packaged.items()]
    return [*own, *map(_describe, missing), *published, *aliases]


def _packaged(name: str, folder: Path) -> dict[str, Any]:
    from foveate.families.spec import ModelSpec  # noqa: PLC0415
    from foveate.weights.folder import CONFIG_NAME, read_config  # noqa: PLC0415

    if not (folder / CONFIG_NAME).is_file():
        return _describe(name)
    return _entry(name, ModelSpec.from_json(read_config(folder)), folder)


def _alias(name: str, folder: Path) -> str | None:
    return folder.name if folder.name != name else None


def _entry(name: str, spec: "ModelSpec", folder: Path | None) -> dict[str, Any]:
    from foveate.families.memory import count_parameters  # noqa: PLC0415
    from foveate.weights.folder import file_bytes  # noqa: PLC0415

    height, width = spec.default_schedule.grids[-1]
    return _describe(
        name,
        alias_of=None if folder is None else _alias(name, folder),
        is_bundled=folder is not None,
        path=None if folder is None else str(folder),
        file_bytes=None if folder is None else file_bytes(folder),
        parameters=count_parameters(spec),
        default_size=[width * spec.stride, height * spec.stride],
        budgets=list(spec.budgets),
        ratios=list(spec.ratios),
        family=spec.family,
        conditioner=spec.conditioner,
    )


def _describe(name: str, **known: Any) -> dict[str, Any]:
    """All keys of an entry; None where nothing is known, as the model is not here."""
    keys = (
        "alias_of",
        "path",
        "file_bytes",
        "parameters",
        "default_size",
        "budgets",
        "ratios",
        "family",
        "conditioner",
    )
    return {"name": name, "is_bundled": False, **dict.fromkeys((*keys, "hub", "licence")), **known}


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
