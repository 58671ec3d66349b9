"""The registered models as plain data: shapes, sizes and files."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.core.schedule import ScaleSchedule, parse_ratio
from foveate.families import BUNDLED, DATA, SHAPES, ModelSpec
from foveate.folder import CONFIG_NAME, read_config
from foveate.models.infinity import Infinity
from foveate.tokenizers.autoencoder import Autoencoder


def all_models() -> list[dict[str, Any]]:
    """Every registered name."""
    bundled = [_bundled(name, DATA / folder) for name, folder in BUNDLED.items()]
    return [*bundled, *(_entry(name, spec, None) for name, spec in SHAPES.items())]


def count_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters of both networks, counted without memory for them."""
    with torch.device("meta"):
        transformer, autoencoder = Infinity(spec.transformer), Autoencoder(spec.autoencoder)
    return {"transformer": _count(transformer), "autoencoder": _count(autoencoder)}


def default_schedule(spec: ModelSpec) -> ScaleSchedule:
    """The scales of a picture of the default size."""
    return ScaleSchedule.from_template(parse_ratio(spec.ratios[0]), spec.budgets[0], spec.patch)


def file_bytes(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bundled(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_NAME).is_file():
        return _describe(name, alias_of=_alias(name, folder))
    return _entry(name, ModelSpec.from_json(read_config(folder)), folder)


def _alias(name: str, folder: Path) -> str | None:
    return folder.name if folder.name != name else None


def _entry(name: str, spec: ModelSpec, folder: Path | None) -> dict[str, Any]:
    height, width = default_schedule(spec).grids[-1]
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
        text_encoder=spec.text_encoder,
    )


def _describe(name: str, **known: Any) -> dict[str, Any]:
    """All keys of an entry; None where nothing is known, as the model is not here."""
    keys = ("alias_of", "path", "file_bytes", "parameters", "default_size", "budgets", "ratios", "text_encoder")
    return {"name": name, "is_bundled": False, **dict.fromkeys(keys), **known}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
