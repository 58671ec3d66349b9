"""Records of tensors: how much memory they hold, and copies of them."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def held_bytes(value: object) -> int:
    """Bytes of all tensors inside dataclasses, tuples, lists and mappings; a tensor that appears twice counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(value)}.values())


def held_copy(value: T) -> T:
    """The same record with a copy of every tensor in it."""
    copied: Any = value
    if isinstance(value, Tensor):
        copied = value.clone()
    elif is_dataclass(value) and not isinstance(value, type):
        copied = type(value)(**{field.name: held_copy(getattr(value, field.name)) for field in fields(value)})
    elif isinstance(value, dict):
        copied = {key: held_copy(item) for key, item in value.items()}
    elif isinstance(value, tuple | list):
        copied = type(value)(held_copy(item) for item in value)
    return copied


def copy_held_(target: object, source: object) -> None:
    """Copies every tensor of a record over the one in the same place of another, of the same shapes."""
    pairs = list(zip(_tensors(target), _tensors(source), strict=True))
    torch._foreach_copy_([over for over, _ in pairs], [tensor for _, tensor in pairs])


def zero_held_(target: object) -> None:
    """Fills every tensor of a record that holds real numbers with zeros; indices stay."""
    for tensor in _tensors(target):
        if tensor.is_floating_point():
            tensor.zero_()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
