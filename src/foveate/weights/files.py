"""Reads and writes files of weights, whatever model they are of; nothing in a file is executed.

Weights are tensors by name. Nested dicts of a training checkpoint are read as names joined with dots. Reading finds the
names; a tensor's bytes are read when somebody copies them (`stored`).
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import CheckpointError
from foveate.core.finite import BrokenWeightError
from foveate.core.stand_in import refuse_stand_in
from foveate.weights.stored import State, Stored, Weight, stored_pickle, stored_safetensors

INDEX_END = ".safetensors.index.json"
_PICKLES = (".pth", ".pt", ".bin", ".ckpt")
_HASH_BLOCK, _HASH_WHOLE = 2**20, 2**30
_HEADER_BYTES = 256
"""Upper bound of what one tensor takes in the header of a safetensors file: its name, dtype, shape and offsets."""


def is_weight_file(path: Path) -> bool:
    """Whether a file is called like one of weights, or like an index of shards."""
    is_called = path.suffix in (".safetensors", *_PICKLES) or path.name.endswith((INDEX_END, ".bin.index.json"))
    return is_called and path.is_file()


def read_weights(path: str | Path) -> Stored:
    """Finds all tensors of a checkpoint; each is mapped from its file when it is asked for, on the CPU.

    Nothing in a file is executed.

    Args:
        path: A .safetensors, .pth or .pt file, an index of shards, a folder that holds one of them, or such a path
            without its ending, as `save_sharded` was given.

    Raises:
        CheckpointError: There is no such file, or it is empty, damaged, of an unknown format, or a stand-in
            (`core.stand_in`).
    """
    path = _locate(Path(path))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_file(path)


def weights_sha256(paths: Iterable[Path]) -> str:
    """Hash over the names and bytes of files, in the given order.

    Of a file above 1 GiB it takes the size, 64 samples spread over it and its two ends, 1 MiB each: reading dozens of
    gigabytes at every start would take longer than generating.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        size = path.stat().st_size
        starts = range(0, size, _HASH_BLOCK) if size <= _HASH_WHOLE else _spread(size)
        if size > _HASH_WHOLE:
            digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_HASH_BLOCK))
    return digest.hexdigest()


def _spread(size: int) -> list[int]:
    return [round((size - _HASH_BLOCK) * i / 65) for i in range(66)]


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


def files_of(path: Path) -> list[Path]:
    """The files that `read_weights` reads for a path: one, or an index and its shards.

    Raises:
        CheckpointError: There is no such file, or the index is damaged.
    """
    path = _locate(path)
    if not path.name.endswith(".index.json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file in front of what is refused about its weights; for a weight in a shard, that shard.

    Args:
        path: What `read_weights` was given.
    """
    try:
        yield
    except BrokenWeightError as error:
        raise CheckpointError(f"{_file_with(path, error.name)}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{_locate(path)}: {error}") from error


def _file_with(path: Path, name: str) -> Path:
    """The shard that holds a weight under a name, or one that ends like it; else what stands for all of them."""
    path = _locate(path)
    if not path.name.endswith(".index.json"):
        return path
    files = {file for key, file in _weight_map(path).items() if key == name or key.endswith(f".{name}")}
    return path.parent / files.pop() if len(files) == 1 else path


def _locate(path: Path) -> Path:
    """The one file that a path means."""
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        found = [p for p in names if p.name.endswith(".index.json")]
        found = found or [p for p in names if p.suffix in (".safetensors", *_PICKLES)]
        if len(found) != 1:
            listed = some([p.name for p in found]) if found else "none"
            raise CheckpointError(f"{path}: the folder must hold one checkpoint, found {listed}; name the file")
        return found[0]
    if not path.exists():
        found = [p for p in (path.with_name(path.name + end) for end in (".safetensors", INDEX_END)) if p.exists()]
        if not found:
            raise CheckpointError(f"{path}: no such file; give a file of weights that exists")
        return found[0]
    return path


def _read_file(path: Path) -> Stored:
    if path.suffix not in (".safetensors", *_PICKLES):
        raise CheckpointError(f"{path}: weights must be .safetensors, {', '.join(_PICKLES)} or an index of shards")
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: the file is empty; fetch it again")
    refuse_stand_in(path)
    try:
        state = stored_safetensors(path) if path.suffix == ".safetensors" else stored_pickle(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "Weights only" not in str(error):
            raise CheckpointError(f"{path}: not a readable weight file, fetch it again") from error
        raise CheckpointError(
            f"{path}: the pickle holds more than tensors and is not opened; save its state dict alone"
        ) from error
    except Exception as error:
        # Damaged bytes make the readers raise almost anything, so nothing narrower would do.
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path}: not a readable weight file, fetch it again ({first})") from error
    if not state:
        raise CheckpointError(f"{path}: the file holds no tensors")
    return state


def _read_shards(path: Path) -> Stored:
    weight_map = _weight_map(path)
    weights: dict[str, Weight] = {}
    for name in sorted(set(weight_map.values())):
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path}: shard {name} is missing")
        weights.update(_read_file(path.parent / name).weights)
    absent = [key for key in weight_map if key not in weights]
    if absent:
        raise CheckpointError(f"{path}: the shards lack {some(absent)}")
    return Stored({key: weights[key] for key in weight_map})


def _weight_map(path: Path) -> dict[str, str]:
    """File name of every weight, from an index."""
    refuse_stand_in(path)
    try:
        weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        is_plain = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable index of shards, fetch it again") from error
    if not is_plain:
        raise CheckpointError(f"{path}: shards must lie beside the index, got {some(names)}")
    return weight_map


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


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many there are."""
    return ", ".join(names[:limit]) + (f", ... ({len(names)})" if len(names) > limit else "")
