"""The registered models as plain data: shapes, sizes and files."""

from pathlib import Path
from typing import Any

from foveate.families.memory import count_parameters
from foveate.families.packaged import DEMO_NAMES, packaged_models
from foveate.families.published import PUBLISHED
from foveate.families.spec import ModelSpec
from foveate.weights.folder import CONFIG_NAME, files_of_folder, read_config


def all_models() -> list[dict[str, Any]]:
    """Every registered name."""
    packaged = packaged_models()
    missing = [name for name in DEMO_NAMES if name not in packaged]
    bundled = [*(_packaged(name, folder) for name, folder in packaged.items()), *map(_describe, missing)]
    published = [
        _entry(name, entry.spec, None) | {"hub": entry.transformer.repo, "licence": entry.licence}
        for name, entry in PUBLISHED.items()
    ]
    return [*bundled, *published]


def file_bytes(folder: Path) -> int:
    """Bytes of the weights and the text tokenizer on disk; a shared text encoder counts."""
    return sum(path.stat().st_size for path in files_of_folder(folder) if path.is_file())


def _packaged(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        return _describe(name)
    return _entry(name, ModelSpec.from_json(read_config(folder)), folder)


def _alias(name: str, folder: Path) -> str | None:
    return folder.name if folder.name != name else None


def _entry(name: str, spec: ModelSpec, folder: Path | None) -> dict[str, Any]:
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
