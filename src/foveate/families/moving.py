"""Moves a loaded model to another device, with everything that its parts say of theirs."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from foveate.families.loading import LoadedModel
from foveate.families.offload import modules_of
from foveate.kernels.linear import Linear

P = TypeVar("P")


# A tensor that is made in inference mode could not be changed outside of it any more.
@torch.inference_mode(mode=False)
def moved(model: LoadedModel, device: torch.device) -> LoadedModel:
    """The model on a device: its modules are moved in place, what names a device is replaced.

    Layers run without tiles afterwards, as those that are loaded there do before the probe (`with_independent_rows`).
    Where a move fails, as memory is short, the modules are moved back.

    Args:
        model: As it was loaded; it is of no use afterwards.
        device: Where it shall compute.
    """
    try:
        for module in _modules(model):
            module.to(device)
    except BaseException:
        for module in _modules(model):
            module.to(model.device)
        raise
    for layer in (layer for module in _modules(model) for layer in module.modules() if isinstance(layer, Linear)):
        layer.tile_rows = layer.whole_rows = None
    return replace(model, device=device, tiled_layers=(), text=_with_device(model.text, device))


def _modules(model: LoadedModel) -> Iterator[nn.Module]:
    for part in (model.transformer, model.tokenizer, model.text):
        yield from modules_of(part)


def _with_device(part: P, device: torch.device) -> P:
    """A conditioner whose fields name the device, those of conditioners in it too; what one kept for itself is gone."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed: dict[str, Any] = {}
    for field in (field for field in fields(part) if field.init):
        value = getattr(part, field.name)
        new = device if isinstance(value, torch.device) else _with_device(value, device)
        if new is not value:
            changed[field.name] = new
    has_memory = any(not field.init for field in fields(part))
    return replace(part, **changed) if changed or has_memory else part
