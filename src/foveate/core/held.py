"""How much memory a record of tensors holds."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from torch import Tensor


def held_bytes(value: object) -> int:
    """Bytes of all tensors inside dataclasses, tuples, lists and mappings; a tensor that appears twice counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(value)}.values())


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
