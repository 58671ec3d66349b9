"""Lazy weights: a tensor is memory-mapped when it is asked for, and freed with it.

Names, shapes and dtypes are read once and at once, so that checks of them open no file; a copy out of a file holds one
tensor at a time beside what it fills. A mapping that stayed open would count every page that was ever read as memory of
this process.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from foveate.core.errors import CheckpointError

_MAPPED_BYTES = 2**20
"""After more than this was read, a file is mapped anew."""

State = Mapping[str, Tensor]
"""Weights by name, without nesting."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weight:
    """A weight that is read later: `described` has its shape and dtype and need not hold values, `read` returns it."""

    described: Tensor
    read: Callable[[], Tensor]


class Stored(State):
    """Weights by name, each made by a function of its own when it is read; nothing is kept."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights

    def __getitem__(self, key: str) -> Tensor:
        return self.weights[key].read()

    def __contains__(self, key: object) -> bool:
        return key in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def described(state: State, key: str) -> Tensor:
    """A tensor of the shape and dtype of a weight, which is not read: only these two can be asked of it."""
    return state.weights[key].described if isinstance(state, Stored) else state[key]


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Describes a weight: a tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def renamed(state: State, names: Mapping[str, str]) -> Stored:
    """Some weights under other names, still unread.

    Args:
        state: The weights.
        names: Name in `state` by new name.
    """
    if isinstance(state, Stored):
        return Stored({name: state.weights[key] for name, key in names.items()})
    return Stored(
        {name: Weight(described=state[key], read=partial(state.__getitem__, key)) for name, key in names.items()}
    )


def stored_safetensors(path: Path) -> Stored:
    """The weights of a safetensors file, whose header is read and checked against the file's length.

    Raises:
        SafetensorError: The file is damaged or cut.
        OSError: It cannot be read.
    """
    weights: dict[str, Weight] = {}
    mapping = _Mapping(path)
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            # Mapped and dropped: no page of it is read.
            mapped = file.get_tensor(key)
            weights[key] = Weight(described=on_meta(tuple(mapped.shape), mapped.dtype), read=partial(mapping.read, key))
    return Stored(weights)


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
    found = dict(_flatten(loaded))
    for key, tensor in found.items():
        if _offset(tensor) + tensor.untyped_storage().nbytes() > size:
            raise CheckpointError(f"{path}: {key} ends behind the end of the file; fetch it again")
    return Stored(
        {
            key: Weight(described=tensor, read=partial(_read_pickled, path, size, tensor))
            for key, tensor in found.items()
        }
    )


class _Mapping:
    """A mapping of a safetensors file, which is dropped once much was read through it and so lets go of its pages.

    Opening costs a parse of the whole header, which takes longer than reading a small tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_read = path, 0
        self.file: Any = None

    def read(self, key: str) -> Tensor:
        """A tensor, which keeps the mapping of its time alive."""
        file = safe_open(self.path, "pt") if self.file is None else self.file
        tensor: Tensor = file.get_tensor(key)
        self.num_read += tensor.nbytes
        if self.num_read > _MAPPED_BYTES:
            self.file, self.num_read = None, 0
        else:
            self.file = file
        return tensor


def _read_pickled(path: Path, size: int, meta: Tensor) -> Tensor:
    """The tensor that one on the meta device describes."""
    begin = _offset(meta)
    whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    part = whole[begin : begin + meta.untyped_storage().nbytes()]
    empty = torch.empty(0, dtype=meta.dtype, device="cpu")
    return empty.set_(part, meta.storage_offset(), meta.shape, meta.stride())


def _offset(meta: Tensor) -> int:
    """Where in the file the storage begins (torch's notes on serialization describe the attribute)."""
    begin = meta.untyped_storage()._checkpoint_offset
    assert begin is not None, "torch.load notes it on the meta device"
    return begin


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts, under names joined with dots."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
