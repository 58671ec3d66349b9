"""Reads published text encoders with transformers, which is an extra, and says in one line what is missing.

transformers is imported where an encoder is read and nowhere else. Tokenizers are read from `tokenizer.json` as they
were published, without it.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.finite import broken_weight, names_of_broken
from foveate.core.hub import is_repository, no_such_file
from foveate.core.stand_in import refuse_stand_in

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHTS_NAME = "model.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_MAX_REASON = 200
"""Characters of somebody else's error that fit in one line of ours."""

logger = logging.getLogger("foveate")


def read_pretrained(
    class_name: str,
    name_or_path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    local_files_only: bool,
) -> tuple[nn.Module, Tokenizer]:
    """Reads an encoder and its tokenizer from a folder or the hub; nothing of the encoder may be missing.

    Pickled weights are read as tensors only, so nothing in them runs.

    Args:
        class_name: Of the model class in transformers, such as `T5EncoderModel`. Weights that it has no place for, such
            as those of a decoder, are left out.
        name_or_path: A folder, or `owner/name` on the hub.
        dtype: What the weights become; modules that the class keeps in float32 beside float16 stay so.
        device: Where they go.
        local_files_only: Whether the hub is not asked.

    Raises:
        FoveateError: transformers is not installed.
        CheckpointError: A file or a weight is missing or damaged, a weight is not finite or overflows `dtype`, or the
            hub gave nothing.
    """
    model_class = getattr(_transformers(), class_name)
    source = _find_source(name_or_path)
    tokenizer = _read_tokenizer(source, local_files_only)
    try:
        with _quiet():
            # Weights of another shape are let through here, since the report that names them is read below.
            model, report = model_class.from_pretrained(
                source,
                dtype=dtype,
                local_files_only=local_files_only,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UnpicklingError as error:
        raise CheckpointError(
            f"weights in {source} are pickled and hold more than tensors; use those in safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read a {class_name} from {source}: {_reason(error)}") from error
    _check_report(report, f"a {class_name} from {source}")
    _check_numbers(model, source)
    return model.to(device), tokenizer


def fetch_beside(source: str | Path, name: str, local_files_only: bool) -> Path:
    """A file of a folder, or the local copy of one in a hub repository.

    Raises:
        CheckpointError: The hub gave nothing.
    """
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return Path(hf_hub_download(str(source), name, local_files_only=local_files_only))
    except Exception as error:
        # The client raises what its network library raises, so nothing narrower would do.
        raise CheckpointError(f"no folder {source}, and no {name} from the hub: {_reason(error)}") from error


def freeze(model: nn.Module, tokenizer: Tokenizer, *, adds_end: bool = True) -> None:
    """Switches gradients, dropout, truncation and padding off, in place, and checks that the two belong together.

    Args:
        model: The encoder.
        tokenizer: Its tokenizer.
        adds_end: Whether the tokenizer must add an end token.

    Raises:
        FoveateError: The tokenizer knows more tokens than the model, or gives the empty prompt none.
    """
    config: Any = model.config
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise FoveateError(
            f"tokenizer must have at most vocab_size = {config.vocab_size} tokens, got {tokenizer.get_vocab_size()}"
        )
    model.requires_grad_(requires_grad=False).eval()
    # Files may come with either switched on. Here prompts are cut by `cut_ids` and never padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if adds_end and not tokenizer.encode("").ids:
        raise FoveateError("tokenizer must add an end token, but the empty prompt has no tokens")


def cut_ids(ids: list[int], max_tokens: int) -> list[int]:
    """The first tokens of a prompt that is too long, and its last one, which is the end token."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def device_of(model: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def _transformers() -> ModuleType:
    try:
        import transformers  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise FoveateError(
            'this text encoder needs transformers, which is not installed: pip install "foveate[text]"'
        ) from error
    return transformers


def _find_source(name_or_path: str | Path) -> str:
    """The folder, which holds the files of an encoder, or the name of a hub repository, which is not asked yet."""
    folder = Path(name_or_path)
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.exists():
        raise CheckpointError(f"a text encoder is a folder with {CONFIG_NAME} and {TOKENIZER_NAME}, {folder} is a file")
    if not is_repository(name_or_path):
        raise no_such_file("text encoder", name_or_path)
    return str(name_or_path)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that lacks a file of an encoder, or holds a stand-in for one."""
    for name in (CONFIG_NAME, TOKENIZER_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(f"a text encoder needs {name}, no such file in {folder}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(f"a text encoder needs {WEIGHTS_NAME}, no such file in {folder}")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", *_WEIGHT_SUFFIXES):
            refuse_stand_in(path)


def _read_tokenizer(source: str, local_files_only: bool) -> Tokenizer:
    path = fetch_beside(source, TOKENIZER_NAME, local_files_only)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer ({_reason(error)})") from error


def _check_report(report: dict[str, Any], what: str) -> None:
    """Raises if a weight was not in the files, which transformers would initialise randomly, or has another shape."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"cannot read {what}: {len(missing)} weights are missing, first {missing[0]}")
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"cannot read {what}: {key} has shape {tuple(stored)} and must have {tuple(expected)} by {CONFIG_NAME}"
        )


def _check_numbers(model: nn.Module, source: str) -> None:
    """Raises if a weight holds NaN or an infinity, as it is stored or in the dtype it was read in."""
    broken = names_of_broken(model.named_parameters())
    if broken:
        read = model.get_parameter(broken[0])
        path, stored = _find_stored(broken[0], source)
        raise CheckpointError(f"{path}: {broken_weight(broken[0], read if stored is None else stored, read.dtype)}")


def _find_stored(name: str, source: str) -> tuple[str, Tensor | None]:
    """The file that holds a weight, and its values there; the source and None where it has another name there."""
    for path in _weight_files(source):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                key = _key_of(name, file.keys())
                if key is not None:
                    return str(path), file.get_tensor(key)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
            key = _key_of(name, held)
            if key is not None:
                return str(path), held[key]
    return source, None


def _key_of(name: str, keys: Iterable[str]) -> str | None:
    """The key of a weight: a file of one part, or of more than the model, has a shorter or longer one."""
    near = [key for key in keys if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")]
    return min(near, key=lambda key: abs(len(key) - len(name)), default=None)


def _weight_files(source: str) -> list[Path]:
    """The weights of a folder, or of the copy of a repository in the cache of the hub."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - slow to import, rarely needed

        cached = try_to_load_from_cache(source, CONFIG_NAME)
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _WEIGHT_SUFFIXES]
    return sorted(files, key=lambda path: path.suffix != ".safetensors")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from listing the weights that it leaves out; what is missing we report ourselves."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
