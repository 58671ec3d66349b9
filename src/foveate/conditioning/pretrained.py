"""Reads published text encoders with transformers, which is an extra, and says in one line what is missing.

transformers is imported where an encoder is read and nowhere else. Tokenizers are read from `tokenizer.json` as they
were published, without it.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from foveate.core.errors import CheckpointError, FoveateError

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
WEIGHTS_NAME = "model.safetensors"

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
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
        name_or_path: A folder, or the name of a hub repository.
        dtype: What the weights become; modules that the class keeps in float32 beside float16 stay so.
        device: Where they go.
        local_files_only: Whether the hub is not asked.

    Raises:
        FoveateError: transformers is not installed.
        CheckpointError: A file or a weight is missing or damaged, or the hub gave nothing.
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
    return model.to(device), tokenizer


def freeze(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Switches gradients, dropout, truncation and padding off, in place, and checks that the two belong together.

    Raises:
        FoveateError: The tokenizer knows more tokens than the model, or gives the empty prompt none.
    """
    config: Any = model.config
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise FoveateError(
            f"tokenizer must have at most vocab_size = {config.vocab_size} tokens, got {tokenizer.get_vocab_size()}"
        )
    model.requires_grad_(requires_grad=False).eval()
    # Files may come with either switched on. Here prompts are cut by `cut_ids`, with a warning, and never padded.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not tokenizer.encode("").ids:
        raise FoveateError("tokenizer must add an end token, but the empty prompt has no tokens")


def cut_ids(ids: list[int], max_tokens: int) -> list[int]:
    """The first tokens of a prompt that is too long, and its last one, which is the end token."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def warn_if_cut(num_tokens: int, max_tokens: int) -> None:
    """Says how many tokens `cut_ids` leaves out, if any."""
    if num_tokens > max_tokens:
        logger.warning(
            "prompt of %d tokens is longer than %d: the last %d tokens were cut",
            num_tokens, max_tokens, num_tokens - max_tokens,
        )  # fmt: skip


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
    if not folder.is_dir():
        if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name_or_path):
            raise CheckpointError(f"no text encoder at {name_or_path}: there is no such folder")
        return name_or_path
    for name in (CONFIG_NAME, TOKENIZER_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(f"a text encoder needs {name}, no such file in {folder}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(f"a text encoder needs {WEIGHTS_NAME}, no such file in {folder}")
    return str(folder)


def _read_tokenizer(source: str, local_files_only: bool) -> Tokenizer:
    path = Path(source) / TOKENIZER_NAME if Path(source).is_dir() else _fetch_tokenizer(source, local_files_only)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer ({_reason(error)})") from error


def _check_report(report: dict[str, Any], what: str) -> None:
    """Raises if a weight was not in the files, which transformers would draw at random, or has another shape."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"cannot read {what}: {len(missing)} weights are missing, first {missing[0]}")
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"cannot read {what}: {key} has shape {tuple(stored)} and must have {tuple(expected)} by {CONFIG_NAME}"
        )


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


def _fetch_tokenizer(name: str, local_files_only: bool) -> Path:
    """The local copy of the tokenizer of a hub repository."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return Path(hf_hub_download(name, TOKENIZER_NAME, local_files_only=local_files_only))
    except Exception as error:
        # The client raises what its network library raises, so nothing narrower would do.
        raise CheckpointError(f"no folder {name}, and no {TOKENIZER_NAME} from the hub: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
