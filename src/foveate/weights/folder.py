"""A model as a folder: written by training, read by `families`.

- config.json: `format`, the version of this layout; shapes, sizes trained on, defaults (`families.spec.ModelSpec`)
- transformer*.safetensors, autoencoder*.safetensors: float16 unless asked otherwise, in shards below 15 MiB
- text_encoder.safetensors, tokenizer.json; text_places.safetensors if it has a position tagger. Models that lie side
  by side may share these three: config.json then says where, as in `"text_encoder": "../minilm"`
- NOTICE, MODEL_CARD.md
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from foveate.conditioning.minilm import TOKENIZER_NAME, WEIGHTS_NAME, TextEncoder
from foveate.conditioning.places import PLACES_NAME
from foveate.core.atomic import write_text
from foveate.core.errors import CheckpointError
from foveate.core.finite import broken_weight, names_of_broken
from foveate.core.layers import empty_module
from foveate.core.stand_in import refuse_stand_in
from foveate.weights.files import naming, read_weights, save_sharded, weights_sha256
from foveate.weights.stored import State

FORMAT = 1
"""Version of the layout that this release writes; it reads this one and all earlier ones."""

CONFIG_NAME = "config.json"
TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"
_TEXT_FILES = (WEIGHTS_NAME, TOKENIZER_NAME, PLACES_NAME)

_BESIDE = re.compile(r"\.\./\w[\w.-]*", re.ASCII)
"""Where a shared text encoder may lie: one level up and one down, so that nothing else of a disk is ever read."""

M = TypeVar("M", bound=nn.Module)


def save_folder(
    folder: Path,
    *,
    config: dict[str, Any],
    transformer: nn.Module,
    autoencoder: nn.Module,
    text_encoder: TextEncoder | str,
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
        text_encoder: Left as it was; its matrices are stored as int8. Or the folder of one that models share, which is
            there already, as `../NAME`.
        notice: Whose work the weights rest on.
        model_card: Markdown.
        dtype: Of transformer and autoencoder on disk.

    Raises:
        CheckpointError: A weight holds NaN or an infinity, or overflows `dtype`, or there is no such folder of a text
            encoder; nothing is written then.
    """
    if isinstance(text_encoder, str):
        config = {**config, "text_encoder": text_encoder}
        _shared_folder(folder, text_encoder)
    modules: tuple[tuple[str, nn.Module], ...] = ((TRANSFORMER, transformer), (AUTOENCODER, autoencoder))
    stored = [(stem, _converted(module, dtype, stem)) for stem, module in modules]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for stem, state in stored:
        save_sharded(state, folder, stem)
    if isinstance(text_encoder, TextEncoder):
        text_encoder.save(folder)
    write_text(folder / "NOTICE", notice)
    write_text(folder / "MODEL_CARD.md", model_card)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _converted(module: nn.Module, dtype: torch.dtype, what: str) -> State:
    """A module's weights in another dtype, which must hold them."""
    own = module.state_dict()
    state = {key: value.detach().to(dtype) for key, value in own.items()}
    broken = names_of_broken(state.items())
    if broken:
        error = broken_weight(broken[0], own[broken[0]], dtype, "dtype")
        raise CheckpointError(f"the {what} is not written: {error}")
    return state


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        CheckpointError: It is missing or not a JSON object, or a later release wrote it.
    """
    path = folder / CONFIG_NAME
    refuse_stand_in(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"a model folder needs {CONFIG_NAME}, no such file in {folder}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(data).__name__}")
    version = data.get("format", FORMAT)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: format must be a whole number, 1 or more, got {version!r}")
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version} is newer than {FORMAT}, the one that this release reads; upgrade foveate"
        )
    return data


def text_encoder_folder(folder: Path) -> Path:
    """The folder that holds a model's text encoder: its own, or the one beside it that config.json names.

    Raises:
        CheckpointError: config.json is missing, or names a folder that is missing or not beside the model's.
    """
    named = read_config(folder).get("text_encoder")
    return folder if named is None else _shared_folder(folder, named)


def _shared_folder(folder: Path, named: object) -> Path:
    """The folder beside a model's that is named as `../NAME`."""
    if not isinstance(named, str) or not _BESIDE.fullmatch(named):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: text_encoder must be a folder beside the model's, as ../NAME, got {named!r}"
        )
    shared = folder / named
    # The folder itself may not exist yet, and then nothing is beside it for the system.
    if not (shared if folder.is_dir() else folder.parent / named.removeprefix("../")).is_dir():
        raise CheckpointError(f"{folder / CONFIG_NAME}: no folder {named} for the text encoder; copy it there as well")
    return shared


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
        CheckpointError: A file is missing or damaged, or weights do not fit, are no numbers or overflow the dtype; the
            file is named.
    """
    model = empty_module(build, dtype, device)
    state = read_weights(path)
    with naming(path):
        load(model, state)
    return model


def read_text_encoder(folder: Path, text_tokens: int, device: torch.device, *, has_places: bool) -> TextEncoder:
    """Reads the text encoder; it computes in float32 and cuts prompts at what the transformer takes.

    Args:
        folder: The folder of the model, which holds the encoder or names the folder that does.
        text_tokens: What the transformer takes at most.
        device: Where it computes.
        has_places: Whether the transformer was trained with a position tagger and needs one.

    Raises:
        CheckpointError: A file is missing, damaged or too many.
    """
    folder = text_encoder_folder(folder)
    for name in _TEXT_FILES:
        refuse_stand_in(folder / name)
    encoder = TextEncoder.from_folder(folder)
    _check_numbers(folder / WEIGHTS_NAME, encoder.model)
    if encoder.places is not None:
        _check_numbers(folder / PLACES_NAME, encoder.places)
    if has_places != (encoder.places is not None):
        needed = "needs" if has_places else "takes no"
        raise CheckpointError(f"{folder}: its conditioner {needed} {PLACES_NAME}, fetch the folder again")
    encoder.to(device)
    return replace(encoder, max_tokens=min(encoder.max_tokens, text_tokens))


def _check_numbers(path: Path, module: nn.Module) -> None:
    """Refuses a module that was read from a file and holds NaN or infinite values."""
    own = module.state_dict()
    broken = names_of_broken(own.items())
    if broken:
        raise CheckpointError(f"{path}: {broken_weight(broken[0], own[broken[0]], own[broken[0]].dtype)}")


def files_of_folder(folder: Path) -> list[Path]:
    """All weight files of a model and its text tokenizer, by name, wherever the text encoder lies.

    Raises:
        CheckpointError: As `text_encoder_folder`.
    """
    shared = text_encoder_folder(folder)
    own = [path for path in folder.glob("*.safetensors") if path.name not in _TEXT_FILES]
    text = [shared / name for name in _TEXT_FILES if name != PLACES_NAME or (shared / name).is_file()]
    return sorted([*own, *text], key=lambda path: path.name)


def file_bytes(folder: Path) -> int:
    """Bytes of the weights and the text tokenizer on disk; a shared text encoder counts."""
    return sum(path.stat().st_size for path in files_of_folder(folder) if path.is_file())


def folder_sha256(folder: Path) -> str:
    """Hash over the files of a model; the same whether its text encoder is shared or not.

    Raises:
        CheckpointError: As `text_encoder_folder`.
    """
    return weights_sha256(files_of_folder(folder))
