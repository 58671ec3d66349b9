"""Weights that stay in their files: a tensor is mapped when it is asked for, and its pages go when it does.

So names and shapes cost nothing, and a copy out of a file holds one tensor at a time beside what it fills. A mapping
that stayed open would count every page that was ever read as memory of this process.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from foveate.core.errors import CheckpointError

State = Mapping[str, Tensor]
"""Weights by name, without nesting."""


class Stored(State):
    """Weights by name, each made by a function of its own when it is read; nothing is kept."""

    def __init__(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __getitem__(self, key: str) -> Tensor:
        return self.readers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def renamed(state: State, names: Mapping[str, str]) -> Stored:
    """Some weights under other names, still unread.

    Args:
        state: The weights.
        names: Name in `state` by new name.
    """
    return Stored({name: partial(state.__getitem__, key) for name, key in names.items()})


def stored_safetensors(path: Path) -> Stored:
    """The weights of a safetensors file, whose header is read and checked against the file's length.

    Raises:
        SafetensorError: The file is damaged or cut.
        OSError: It cannot be read.
    """
    with safe_open(path, "pt") as file:
        return Stored({key: partial(_read_safetensors, path, key) for key in file.keys()})  # noqa: SIM118 - no mapping


def stored_pickle(path: Path) -> Stored:
    """The tensors of a pickle, by names joined with dots where dicts are nested; nothing in it is executed.

    Only the current format of `torch.save` can be mapped; older ones are read at once and held.

    Raises:
        CheckpointError: A tensor ends behind the end of the file.
        Exception: Almost anything, if the file is damaged.
    """
    try:
        # On the meta device a storage is not read, and knows where in the file it lies.
        loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        held = dict(_flatten(torch.load(path, map_location="cpu", weights_only=True)))
        return renamed(held, {key: key for key in held})
    size = path.stat().st_size
    described = dict(_flatten(loaded))
    for key, tensor in described.items():
        if _offset(tensor) + tensor.untyped_storage().nbytes() > size:
            raise CheckpointError(f"{path}: {key} ends behind the end of the file; fetch it again")
    return Stored({key: partial(_read_pickled, path, size, tensor) for key, tensor in described.items()})


def _read_safetensors(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def _read_pickled(path: Path, size: int, described: Tensor) -> Tensor:
    """The tensor that one on the meta device describes."""
    begin = _offset(described)
    whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    part = whole[begin : begin + described.untyped_storage().nbytes()]
    empty = torch.empty(0, dtype=described.dtype, device="cpu")
    return empty.set_(part, described.storage_offset(), described.shape, described.stride())


def _offset(described: Tensor) -> int:
    """Where in the file the storage begins (torch's notes on serialization describe the attribute)."""
    begin = described.untyped_storage()._checkpoint_offset
    assert begin is not None, "torch.load notes it on the meta device"
    return begin


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts, under names joined with dots."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
