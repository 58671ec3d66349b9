"""Rewrites a published checkpoint as safetensors: no nesting, wrapper names or constants, and a hash of each tensor.

What is written loads like the original; the manifest beside it lets anyone check a file without trusting it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.family import FAMILIES, Network
from foveate.models.checkpoint import check_fit, check_floats, kind_of
from foveate.models.checkpoint_infinity import autoencoder_state, infer_infinity_config, transformer_tensors
from foveate.models.checkpoint_switti import switti_state
from foveate.models.checkpoint_var import var_state
from foveate.models.checkpoint_vq import vq_state
from foveate.models.stored import State
from foveate.models.weight_files import INDEX_END, files_of, read_weights, save_sharded, weights_sha256

MANIFEST_NAME = "manifest.json"
SHARD_BYTES = 5 * 2**30
"""Largest file of a folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """How one kind of weights is written: plain names, and the network that they must fit."""

    plain: Callable[[State], State]
    network: Network


def _chunked(state: State) -> State:
    return transformer_tensors(state, infer_infinity_config(state))


_KINDS: dict[str, _Kind] = {
    "Infinity": _Kind(plain=_chunked, network=FAMILIES["infinity"].transformer),
    "autoencoder": _Kind(plain=autoencoder_state, network=FAMILIES["infinity"].autoencoder),
    "VAR": _Kind(plain=var_state, network=FAMILIES["var"].transformer),
    "VQ": _Kind(plain=vq_state, network=FAMILIES["var"].autoencoder),
    "Switti": _Kind(plain=switti_state, network=FAMILIES["switti"].transformer),
}


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
    """What was written: the kind of weights, the files (the manifest last) and their size in bytes."""

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
        FoveateError: The target exists, or is no place for safetensors.
        CheckpointError: The source is damaged, of no known kind, or does not fit its own shape.
    """
    is_file = target.suffix == ".safetensors"
    manifest = target.with_name(f"{target.stem}.{MANIFEST_NAME}") if is_file else target / MANIFEST_NAME
    if target.suffix and not is_file:
        raise FoveateError(f"{target}: the target must end in .safetensors, or be a folder")
    if manifest.exists() or (is_file and target.exists()) or (not is_file and any(target.glob("*.safetensors*"))):
        raise FoveateError(f"{target} exists; remove it or choose another place")
    state = read_weights(source)
    kind = kind_of(state)
    if kind is None:
        raise CheckpointError(f"{source}: the weights are of no kind that is known here ({', '.join(_KINDS)})")
    plain = _KINDS[kind].plain(state)
    _check(kind, plain)
    cast = _Cast(plain, dtype)
    if is_file:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(target) as partial:
            save_file({key: cast[key].contiguous() for key in cast}, partial)
        written = [target]
    else:
        written = save_sharded(cast, target, "model", SHARD_BYTES)
    beside = (source if source.is_dir() else source.parent) / "config.json"
    if kind == "Switti" and beside.is_file():
        write_text(manifest.with_name("config.json"), beside.read_text(encoding="utf-8"))
    described = _describe(kind, source, written)
    write_text(manifest, json.dumps(described, indent=1) + "\n")
    tensors = described["tensors"]
    return Converted(
        kind=kind,
        files=(*written, manifest),
        num_tensors=len(tensors),
        num_bytes=sum(entry["bytes"] for entry in tensors.values()),
    )


def _check(kind: str, plain: Mapping[str, Tensor]) -> None:
    """Refuses weights that would not load: a converted file is complete or does not exist."""
    network = _KINDS[kind].network
    # Whether scales of Switti see earlier ones changes no weight.
    config = network.infer(plain, {"use_ar": False})
    with torch.device("meta"):
        module = network.build(config)
    check_fit(module, plain, kind)
    check_floats(plain, kind)


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
