"""Rewrites a published checkpoint as safetensors: no nesting, wrapper names or constants, and a hash of each tensor.

What is written loads like the original; the manifest beside it lets anyone check a file without trusting it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.finite import broken_weight, names_of_broken
from foveate.core.stand_in import refuse_stand_in
from foveate.families import registry
from foveate.families.family import Network
from foveate.weights.files import INDEX_END, files_of, naming, read_weights, save_sharded, some, weights_sha256
from foveate.weights.key_map import check_fit, check_floats
from foveate.weights.names import kind_within
from foveate.weights.stored import State

MANIFEST_NAME = "manifest.json"
SHARD_BYTES = 5 * 2**30
"""Largest file of a folder."""


class _Cast(Mapping[str, Tensor]):
    """Weights in another dtype, converted when they are read: one tensor at a time lives twice."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self.state, self.dtype = state, dtype

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.state[key]
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What was written: the weight kind, the files (the manifest last) and their size in bytes."""

    kind: str
    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int


def convert(source: Path, target: Path, dtype: torch.dtype | None = None) -> Converted:
    """Converts one network.

    Args:
        source: Any file, index or folder that `read_weights` takes.
        target: A .safetensors file, or a folder for shards of 5 GiB; neither may exist with weights in it.
        dtype: Of all floating-point weights; None keeps what each one has.

    Raises:
        FoveateError: The target exists, or is neither a .safetensors file nor a folder.
        CheckpointError: The source is damaged or unknown, or does not fit its own shape; a weight is not finite,
            or overflows `dtype`. Nothing is written then.
    """
    place = _Place(target=target)
    place.refuse()
    state = read_weights(source)
    with naming(source):
        network, plain = _plain(state)
        cast = _Cast(plain, dtype)
        _check_numbers(cast)
    facts = _facts_beside(source) if network.unseen else None
    with place.writing(facts):
        written = _write(cast, target) if place.is_file else save_sharded(cast, target, "model", SHARD_BYTES)
        described = _describe(network.kind, source, written)
        write_text(place.manifest, json.dumps(described, indent=1) + "\n")
    tensors = described["tensors"]
    return Converted(
        kind=network.kind,
        files=(*written, place.manifest),
        num_tensors=len(tensors),
        num_bytes=sum(entry["bytes"] for entry in tensors.values()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where weights are written: a file, or a folder."""

    target: Path

    @property
    def is_file(self) -> bool:
        return self.target.suffix == ".safetensors"

    @property
    def folder(self) -> Path:
        return self.target.parent if self.is_file else self.target

    @property
    def manifest(self) -> Path:
        return self.folder / (f"{self.target.stem}.{MANIFEST_NAME}" if self.is_file else MANIFEST_NAME)

    def refuse(self) -> None:
        """Refuses a place where something would be overwritten."""
        if self.target.suffix and not self.is_file:
            raise FoveateError(f"{self.target}: the target must end in .safetensors, or be a folder")
        if self.manifest.exists() or self._weights():
            raise FoveateError(f"{self.target} exists; remove it or choose another place")

    def _weights(self) -> list[Path]:
        """The files of weights that are there, which are ours once writing has begun."""
        if self.is_file:
            return [self.target] if self.target.exists() else []
        return list(self.target.glob("*.safetensors*"))

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FoveateError(f"cannot make {self.folder}: {error.strerror}; choose another place") from error

    @contextmanager
    def writing(self, facts: str | None) -> Iterator[None]:
        """Makes the folder and a config.json with `facts`; takes away all that was written if the block raises.

        Raises:
            FoveateError: Another config.json is there.
        """
        config = self.folder / "config.json"
        is_new = facts is not None and not config.exists()
        if facts is not None and not is_new and config.read_text(encoding="utf-8") != facts:
            raise FoveateError(f"{config} exists and is another than the source's; choose another place")
        made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        try:
            self._make()
            if facts is not None and is_new:
                write_text(config, facts)
            yield
        except BaseException:
            for path in (*self._weights(), self.manifest, *([config] if is_new else [])):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                for place in made:
                    place.rmdir()
            raise


def _facts_beside(source: Path) -> str | None:
    """The config.json beside the source, which says what some weights do not."""
    config = (source if source.is_dir() else source.parent) / "config.json"
    refuse_stand_in(config)
    return config.read_text(encoding="utf-8") if config.is_file() else None


def _write(state: State, target: Path) -> list[Path]:
    with replace_file(target) as partial:
        save_file({key: state[key].contiguous() for key in state}, partial)
    return [target]


def _networks() -> dict[str, Network]:
    """Every network by its weight kind."""
    return {
        network.kind: network for family in registry.FAMILIES for network in (family.transformer, family.autoencoder)
    }


def _plain(state: State) -> tuple[Network, State]:
    """The network that weights belong to, and them under plain names.

    Raises:
        CheckpointError: Their weight kind is unknown, or they would not load; only complete files are written.
    """
    kind, networks = kind_within(state), _networks()
    if kind is None:
        known = ", ".join(networks)
        raise CheckpointError(f"unknown weight kind (known: {known}); the file holds {some(sorted(state))}")
    network = networks[kind]
    plain = network.plain(state)
    config = network.infer(plain, network.unseen)
    with torch.device("meta"):
        module = network.build(config)
    check_fit(module, plain, kind)
    check_floats(plain, kind)
    return network, plain


def _check_numbers(cast: _Cast) -> None:
    """Refuses weights that are NaN or infinite as they would be written; one of them is in memory at a time."""
    for key in cast:
        written = cast[key]
        if names_of_broken([(key, written)]):
            raise broken_weight(key, cast.state[key], written.dtype)


def _describe(kind: str, source: Path, written: list[Path]) -> dict[str, Any]:
    """The manifest, from what really lies in the files."""
    files = [path for path in written if not path.name.endswith(INDEX_END)]
    tensors: dict[str, dict[str, Any]] = {}
    for path in files:
        for key, tensor in read_weights(path).items():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            tensors[key] = {
                "file": path.name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    return {
        "format": 1,
        "kind": kind,
        "source": {"files": [path.name for path in files_of(source)], "sha256": weights_sha256(files_of(source))},
        "tensors": tensors,
    }
