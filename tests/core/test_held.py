"""Bytes of nested records, against a sum by hand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.held import held_bytes


@dataclass(frozen=True, slots=True)
class Inner:
    keys: tuple[Tensor, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Outer:
    inner: list[Inner]
    bias: Tensor | None
    counts: dict[str, Tensor]


def test_tensors_are_found_wherever_they_lie_and_the_same_one_counts_once() -> None:
    whole, half = torch.zeros(10, 4), torch.zeros(3).half()
    record = Outer(
        inner=[Inner(keys=(whole[:5], whole[5:]), name="a"), Inner(keys=(half, half), name="b")],
        bias=None,
        counts={"n": torch.zeros(2, dtype=torch.int64)},
    )
    assert held_bytes(record) == 10 * 4 * 4 + 3 * 2 + 2 * 8
    assert held_bytes((None, 3, "x")) == 0
