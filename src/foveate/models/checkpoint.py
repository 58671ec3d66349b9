"""Published weights to ours: reads weight files, maps the keys of the Infinity family, refuses what it does not know.

Constant buffers (masks, the zero bias of the keys, the quantiser's) may be there or not; everything else has to fit.
Other families are refused by name.
Source: the published checkpoints of Infinity (arXiv 2412.04431) and their key names.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import CheckpointError, UnsupportedError
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig

State = Mapping[str, Tensor]
"""Weights by name, without nesting: a nested dict is read as names joined with dots."""

INDEX_END = ".safetensors.index.json"
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_HEADER_BYTES = 256
"""Upper bound of what one tensor takes in the header of a safetensors file: its name, dtype, shape and offsets."""

_TRANSFORMER_NESTS = ("trainer.gpt_fsdp.", "gpt_fsdp.")
_AUTOENCODER_NESTS = ("vae.", "ema.")
_CONSTANTS = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_QUANTISERS = ("quantizer.", "quantize.")
_FOREIGN = {
    "class_emb.weight": "VAR",
    "crop_embed.weight": "Switti",
    "quantize.embedding.weight": "a VQ autoencoder (VAR, Switti, HART, STAR)",
}
"""A key that no checkpoint of the Infinity family has, and whose it is."""

_BLOCK = re.compile(r"(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.(.+)")
_WRAPPED_CONV = re.compile(r"^(.*(?:conv\w*|nin_shortcut))\.conv\.(weight|bias)$")
_WRAPPED_NORM = re.compile(r"^(.*norm\w*)\.norm\.(weight|bias)$")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint to the CPU; nothing in a file is executed.

    Args:
        path: A .safetensors, .pth or .pt file, an index of shards, a folder that holds one of them, or such a path
            without its ending, as `save_sharded` was given.

    Raises:
        CheckpointError: There is no such file, or it is empty, damaged or of an unknown kind.
    """
    path = _locate(Path(path))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_file(path)


def save_sharded(state: State, folder: str | Path, stem: str, max_bytes: int = 15 * 2**20) -> list[Path]:
    """Writes weights as safetensors files; `read_weights(folder / stem)` reads them back.

    One `stem.safetensors` if that is small enough, else `stem-00001-of-000NN.safetensors` and an index. Each file
    appears complete or not at all, the index last; files that an earlier save under this stem left are removed.

    Args:
        state: The weights.
        folder: Where; it is made.
        stem: First part of the names.
        max_bytes: Largest size of a file. A single tensor that is larger gets a file of its own.

    Returns:
        The files written, the index last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(state, max_bytes)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    written = []
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
        with replace_file(folder / name) as partial:
            save_file(tensors, partial)
        written.append(folder / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(folder / f"{stem}{INDEX_END}")
        write_text(written[-1], json.dumps(index, indent=1) + "\n")
    shard_name = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for old in folder.iterdir():
        if shard_name.fullmatch(old.name) and old not in written:
            old.unlink()
    return written


def infer_infinity_config(state: State) -> InfinityConfig:
    """Reads the shape of an Infinity transformer off its weights (what leaves no trace in them keeps its default).

    Raises:
        CheckpointError: A weight that the shape follows from is missing.
        UnsupportedError: The weights are of another family.
    """
    state = _transformer_state(state)
    chunks, per_chunk = _chunking(state)
    block = "block_chunks.0.module.0" if any(key.startswith("block_chunks.") for key in state) else "blocks.0"
    text_tokens, text_width = _shape(state, "cfg_uncond", 2)
    width, bits = _shape(state, "word_embed.weight", 2)
    return InfinityConfig(
        depth=chunks * per_chunk,
        width=width,
        heads=math.prod(_shape(state, f"{block}.sa.scale_mul_1H11", 4)),
        bits=bits,
        text_width=text_width,
        pool_heads=_shape(state, "text_proj_for_sos.ca.mat_q", 3)[1],
        chunks=chunks,
        text_tokens=text_tokens,
        ff_width=_shape(state, f"{block}.ffn.fc1.weight", 2)[0],
    )


def infer_autoencoder_config(state: State) -> AutoencoderConfig:
    """Reads the shape of an autoencoder off its weights.

    Raises:
        CheckpointError: A weight that the shape follows from is missing.
        UnsupportedError: The weights are of another family.
    """
    state = _autoencoder_state(state)
    base, pixels = _shape(state, "encoder.conv_in.weight", 4)[:2]
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    widths = [_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    return AutoencoderConfig(
        latent_channels=_shape(state, "decoder.conv_in.weight", 4)[1],
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        patch=round((pixels / 3) ** 0.5),
    )


def load_transformer(model: Infinity, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into a transformer.

    Args:
        model: Is changed; left as it was when loading is refused.
        state: Weights under their published names, also inside a training checkpoint.
        dtype: Changes the model's dtype; None keeps it.

    Raises:
        CheckpointError: A weight is missing, unknown or of another shape.
        UnsupportedError: The weights are of another family.
    """
    size = model.config.depth // model.config.chunks
    tensors: dict[str, Tensor] = {}
    found = _transformer_state(state)
    _, per_chunk = _chunking(found)
    for key, tensor in found.items():
        match = _BLOCK.fullmatch(key)
        name = key
        if match is not None:
            index = int(match[1] or 0) * per_chunk + int(match[2])
            name = f"block_chunks.{index // size}.module.{index % size}.{match[3]}"
        is_gain = name.endswith("scale_mul_1H11")
        _put(tensors, name, tensor.reshape(1, -1, 1, 1) if is_gain else tensor)
    _fill(model, tensors, "transformer", dtype)


def load_autoencoder(model: Autoencoder, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into an autoencoder.

    Args:
        model: Is changed; left as it was when loading is refused.
        state: Weights under their published names, with or without the names of wrappers (`conv1.conv.weight`), also
            below `vae` or, where there is no `vae`, below `ema`.
        dtype: Changes the model's dtype; None keeps it.

    Raises:
        CheckpointError: A weight is missing, unknown or of another shape.
        UnsupportedError: The weights are of another family.
    """
    _fill(model, _autoencoder_state(state), "autoencoder", dtype)


def _locate(path: Path) -> Path:
    """The one file that a path means."""
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        found = [p for p in names if p.name.endswith(".index.json")]
        found = found or [p for p in names if p.suffix in (".safetensors", *_PICKLES)]
        if len(found) != 1:
            listed = _some([p.name for p in found]) if found else "none"
            raise CheckpointError(f"{path}: the folder must hold one checkpoint, found {listed}; name the file")
        return found[0]
    if not path.exists():
        found = [p for p in (path.with_name(path.name + end) for end in (".safetensors", INDEX_END)) if p.exists()]
        if not found:
            raise CheckpointError(f"{path}: there is no such weight file")
        return found[0]
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", *_PICKLES):
        raise CheckpointError(f"{path}: weights must be .safetensors, {', '.join(_PICKLES)} or an index of shards")
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged bytes make the readers raise almost anything, so nothing narrower would do.
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path}: not a readable weight file, fetch it again ({first})") from error
    tensors = dict(_flatten(loaded))
    if not tensors:
        raise CheckpointError(f"{path}: the file holds no tensors")
    return tensors


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        is_plain = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable index of shards, fetch it again") from error
    if not is_plain:
        raise CheckpointError(f"{path}: shards must lie beside the index, got {_some(names)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: shard {name} is missing")
        tensors.update(_read_file(path.parent / name))
    absent = [key for key in weight_map if key not in tensors]
    if absent:
        raise CheckpointError(f"{path}: the shards lack {_some(absent)}")
    return {key: tensors[key] for key in weight_map}


def _flatten(value: object, prefix: str = "") -> Iterable[tuple[str, Tensor]]:
    """All tensors of nested dicts, under names joined with dots."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))


def _split(state: State, max_bytes: int) -> list[list[str]]:
    """Keys of each file, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, tensor in state.items():
        size = tensor.nbytes + _HEADER_BYTES
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def _below(state: State, nests: Sequence[str]) -> dict[str, Tensor]:
    """The weights below the first nest that exists, or all of them."""
    for nest in nests:
        found = {key.removeprefix(nest): tensor for key, tensor in state.items() if key.startswith(nest)}
        if found:
            return found
    return dict(state)


def _refuse_foreign(state: State) -> None:
    for key, family in _FOREIGN.items():
        if key in state:
            raise UnsupportedError(
                f"the weights are of {family} (they hold {key}); this version loads the Infinity family only"
            )


def _transformer_state(state: State) -> dict[str, Tensor]:
    """A transformer's weights without nesting and constant buffers."""
    state = _below(state, _TRANSFORMER_NESTS)
    _refuse_foreign(state)
    return {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in _CONSTANTS}


def _autoencoder_state(state: State) -> dict[str, Tensor]:
    """An autoencoder's weights without nesting, wrapper names and the quantiser's buffers."""
    state = _below(state, _AUTOENCODER_NESTS)
    _refuse_foreign(state)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not key.startswith(_QUANTISERS):
            _put(tensors, _unwrap(key), tensor)
    return tensors


def _unwrap(key: str) -> str:
    """A key without the name of the wrapper around a convolution or a norm."""
    for pattern in (_WRAPPED_CONV, _WRAPPED_NORM):
        match = pattern.match(key)
        if match is not None:
            return f"{match[1]}.{match[2]}"
    return key


def _chunking(state: State) -> tuple[int, int]:
    """Chunks and blocks per chunk; blocks without chunks count as one chunk."""
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match is not None]
    chunks = 1 + max((int(match[1] or 0) for match in blocks), default=-1)
    per_chunk = 1 + max((int(match[2]) for match in blocks), default=-1)
    return chunks, per_chunk


def _count(state: State, pattern: str) -> int:
    """One more than the largest number that a pattern finds at the start of a key."""
    matches = [match for match in map(re.compile(pattern).match, state) if match is not None]
    return 1 + max((int(match[1]) for match in matches), default=-1)


def _shape(state: State, key: str, num_axes: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"the weights lack {key}, so their shape cannot be told; found {_some(sorted(state))}")
    if state[key].dim() != num_axes:
        raise CheckpointError(f"{key} must have {num_axes} axes, got shape {tuple(state[key].shape)}")
    return tuple(state[key].shape)


def _put(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise CheckpointError(f"the weights hold {name} twice, under two names")
    tensors[name] = tensor


def _some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many there are."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")


def _fill(module: nn.Module, tensors: State, what: str, dtype: torch.dtype | None) -> None:
    """Copies weights after everything has been checked."""
    own = module.state_dict()
    missing, unknown = [key for key in own if key not in tensors], [key for key in tensors if key not in own]
    if missing or unknown:
        parts = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        parts += [f"{len(unknown)} unknown: {_some(unknown)}"] if unknown else []
        raise CheckpointError(f"the weights do not fit this {what}; keys {'; '.join(parts)}")
    wrong = [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        key = wrong[0]
        wanted, got = tuple(own[key].shape), tuple(tensors[key].shape)
        more = f" ({len(wrong)} such keys)" if len(wrong) > 1 else ""
        raise CheckpointError(f"the weights do not fit this {what}; {key} wants {wanted}, got {got}{more}")
    if dtype is not None:
        module.to(dtype)
    with torch.no_grad():
        for key, own_tensor in module.state_dict().items():
            own_tensor.copy_(tensors[key])
