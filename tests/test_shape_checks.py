"""The checks of `shape_checks`: on in the suite, in full for everything new, and no second time for what passed."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels.norm import norm_modulate
from tests import shape_checks

checked = shape_checks.once(typechecker=beartype)


@checked
def pick(x_BlC: Float[Tensor, "B l C"], width: int, of: Callable[[], Tensor]) -> Float[Tensor, "B C"]:
    return of()


def test_the_package_is_checked_by_them():
    assert jaxtyping.jaxtyped is shape_checks.once
    rows = Rows((2, 1))
    good = (torch.ones(3, 8), torch.ones(2, 1, 8), torch.ones(2, 1, 8), rows, torch.float32)
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="norm_modulate"):
            norm_modulate(torch.ones(3, 8, dtype=torch.int64), *good[1:])
    with pytest.raises(TypeCheckError):
        Rows("two")


def test_arguments_and_results_that_are_new_are_checked():
    x, good = torch.ones(2, 5, 4), torch.ones(2, 4)
    for _ in range(3):
        assert pick(x, 1, lambda: good) is good
    with pytest.raises(TypeCheckError, match="x_BlC"):
        pick(x[0], 1, lambda: good)
    for wrong in (torch.ones(2, 5), torch.ones(2, 4).int(), None):
        for _ in range(2):
            with pytest.raises(TypeCheckError, match="return value"):
                pick(x, 1, lambda wrong=wrong: wrong)
    with pytest.raises(TypeCheckError, match="width"):
        pick(x, 1.0, lambda: good)
    assert pick(x, 1, lambda: good) is good


def test_each_signature_is_checked_once_and_the_function_called_each_time(monkeypatch: pytest.MonkeyPatch):
    counts = {"checks": 0, "calls": 0}

    def counting(function: Any) -> Any:
        inner = beartype(function)

        def outer(*args: object, **kwargs: object) -> object:
            counts["checks"] += 1
            return inner(*args, **kwargs)

        return outer

    @shape_checks.once(typechecker=counting)
    def double(x_n: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        counts["calls"] += 1
        return 2 * x_n

    for length in (3, 3, 3, 4, 3):
        assert double(torch.ones(length)).tolist() == [2.0] * length
    assert counts == {"checks": 4, "calls": 5}, "two checks, of arguments and of the result, for each length"


@checked
@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    name: Literal["a", "b"]
    parts: Sequence[Int[Tensor, " n"]] = ()


def test_records_are_checked_by_value_of_strings_and_by_elements():
    assert Record("a") == Record("a")
    with pytest.raises(TypeCheckError):
        Record("c")
    part = torch.ones(2, dtype=torch.int64)
    assert Record("b", (part,)).parts == (part,)
    with pytest.raises(TypeCheckError):
        Record("b", (part.float(),))
    with pytest.raises(TypeCheckError):
        Record("b", ["x"])


@checked
def count(*, upto: int = 2) -> Iterator[int]:
    yield from range(upto)


class Kind:
    @classmethod
    @checked
    def make(cls, size: int = 1) -> Tensor:
        return torch.ones(size) if size else None


def test_generators_methods_and_errors_pass_through():
    assert [*count(upto=3), *count(), *count()] == [0, 1, 2, 0, 1, 0, 1]
    assert Kind.make().shape == (1,)
    with pytest.raises(TypeCheckError, match="return value"):
        Kind.make(0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        count(up=1)
    assert "norm_modulate" in norm_modulate.__qualname__
