"""A model as a folder: written by training, read by `families`.

- config.json: shapes, sizes trained on, defaults (`families.spec.ModelSpec`)
- transformer*.safetensors, autoencoder*.safetensors: float16 unless asked otherwise, in shards below 15 MiB
- text_encoder.safetensors, tokenizer.json; text_places.safetensors if the encoder marks places
- NOTICE, MODEL_CARD.md
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from foveate.conditioning.minilm import TextEncoder
from foveate.conditioning.places import PLACES_NAME
from foveate.core.atomic import write_text
from foveate.core.errors import CheckpointError
from foveate.models.random_weights import empty_module
from foveate.models.stored import State
from foveate.models.weight_files import read_weights, save_sharded, weights_sha256

CONFIG_NAME = "config.json"
TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"

M = TypeVar("M", bound=nn.Module)


def save_folder(
    folder: Path,
    *,
    config: dict[str, Any],
    transformer: nn.Module,
    autoencoder: nn.Module,
    text_encoder: TextEncoder,
    notice: str,
    model_card: str,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a model; files of the same names are replaced, config.json last.

    Args:
        folder: Where; it is made.
        config: `families.spec.ModelSpec.to_json()`.
        transformer: Left as it was.
        autoencoder: Left as it was.
        text_encoder: Left as it was; its matrices are stored as int8.
        notice: Whose work the weights rest on.
        model_card: Markdown.
        dtype: Of transformer and autoencoder on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    modules: tuple[tuple[str, nn.Module], ...] = ((TRANSFORMER, transformer), (AUTOENCODER, autoencoder))
    for stem, module in modules:
        save_sharded({key: value.detach().to(dtype) for key, value in module.state_dict().items()}, folder, stem)
    text_encoder.save(folder)
    write_text(folder / "NOTICE", notice)
    write_text(folder / "MODEL_CARD.md", model_card)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        CheckpointError: It is missing or not a JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"a model folder needs {CONFIG_NAME}, no such file in {folder}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(data).__name__}")
    return data


def read_network(
    path: Path, build: Callable[[], M], load: Callable[[M, State], None], dtype: torch.dtype, device: torch.device
) -> M:
    """Reads a network into a dtype, whatever dtype it has on disk.

    Args:
        path: Its weights, with or without the ending.
        build: Makes the module; its default weights are never computed.
        load: Copies weights under their published names.
        dtype: What it shall compute in.
        device: Where.

    Raises:
        CheckpointError: A file is missing or damaged, or weights do not fit.
    """
    model = empty_module(build, dtype, device)
    load(model, read_weights(path))
    return model


def read_text_encoder(folder: Path, text_tokens: int, device: torch.device, *, has_places: bool) -> TextEncoder:
    """Reads the text encoder; it computes in float32 and cuts prompts at what the transformer takes.

    Args:
        folder: The folder of the model.
        text_tokens: What the transformer takes at most.
        device: Where it computes.
        has_places: Whether the transformer was taught with marks of places; without them it would draw at random.

    Raises:
        CheckpointError: A file is missing, damaged or too many.
    """
    encoder = TextEncoder.from_folder(folder)
    if has_places != (encoder.places is not None):
        needed = "needs" if has_places else "takes no"
        raise CheckpointError(f"{folder}: its conditioner {needed} {PLACES_NAME}, fetch the folder again")
    encoder.to(device)
    return replace(encoder, max_tokens=min(encoder.max_tokens, text_tokens))


def folder_sha256(folder: Path) -> str:
    """Hash over all weight files and the text tokenizer."""
    return weights_sha256(sorted([*folder.glob("*.safetensors"), folder / "tokenizer.json"]))
