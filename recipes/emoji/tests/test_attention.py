"""Attention by AMX against the spelled-out twin in float64, gradients included, on fresh random inputs."""

import pytest
import torch
from torch import Tensor

from foveate.kernels import native
from recipes.emoji import attention
from recipes.emoji.attention import attend, attend_spelled_out
from recipes.emoji.loop import flops_of

pytestmark = pytest.mark.skipif(not native.has_amx(), reason="the processor has no AMX, or it is switched off")

SHAPES = [(2, 2, 9, 3, 16), (2, 3, 5, 7, 32), (1, 2, 97, 130, 96), (3, 2, 13, 513, 64), (2, 1, 200, 300, 48)]
"""Images, heads, queries, keys, width."""
STEP = 6e-3
"""Relative error of whole tensors: weights and results are rounded to 8 bits."""


def inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """Queries, keys, values with the strides of training, and a gradient of the output."""
    images, heads, queries, keys, width = shape
    qkv = [torch.randn(images, count, heads, width) for count in (queries, keys, keys, queries)]
    return [x.bfloat16().transpose(1, 2) for x in qkv]


def seen_by(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    """How many keys are seen, at least two: all, a number for each query, for each image, or for each of both."""
    images, _, queries, keys, _ = shape
    sizes = {"queries": (1, queries), "images": (images, 1), "both": (images, queries)}
    return torch.randint(2, keys + 1, sizes[kind]) if kind in sizes else None


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-6))


def with_gradients(function, tensors: list[Tensor], scale: float, seen: Tensor | None, double: bool) -> list[Tensor]:
    *qkv, d_out = [x.double() if double else x for x in tensors]
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = function(*qkv, scale, seen)
    return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]


@pytest.mark.parametrize("kind", ["all", "queries", "images", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_it_agrees_with_the_spelled_out_twin(num_threads: int, shape: tuple[int, ...], kind: str) -> None:
    tensors, seen = inputs(shape), seen_by(kind, shape)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = with_gradients(attend, tensors, 0.2, seen, False)
    finally:
        torch.set_num_threads(before)
    expected = with_gradients(attend_spelled_out, tensors, 0.2, seen, True)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype is torch.bfloat16
        assert got.shape == wanted.shape
        assert error(got, wanted) < STEP


@pytest.mark.parametrize("spread", [0.0, 30.0, 1e3])
def test_extreme_scores_have_finite_gradients(spread: float) -> None:
    """Scores of hundreds and of many thousands, all of them below zero: exp of one alone would overflow."""
    q, k, v, d_out = inputs((1, 2, 40, 90, 32))
    q, k = -q.abs() * spread, k.abs()
    found = with_gradients(attend, [q, k, v, d_out], 1.0, None, False)
    expected = with_gradients(attend_spelled_out, [q, k, v, d_out], 1.0, None, True)
    assert all(x.isfinite().all() for x in found)
    assert error(found[0], expected[0]) < STEP
    assert error(found[3], expected[3]) < STEP


def test_an_image_has_the_same_numbers_alone_and_in_company() -> None:
    tensors = inputs((3, 2, 37, 70, 64))
    together = with_gradients(attend, tensors, 0.2, None, False)
    alone = with_gradients(attend, [x[1:2] for x in tensors], 0.2, None, False)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_a_gradient_without_strides_and_a_part_of_a_tensor() -> None:
    """What `sum` hands back, and keys that lie in a longer tensor."""
    q, k, v, _ = inputs((2, 2, 9, 40, 32))
    qkv = [x.detach().requires_grad_() for x in (q, k[:, :, :21], v.contiguous()[:, :, :21])]
    found = torch.autograd.grad(attend(*qkv, 0.2).sum(), qkv)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    expected = torch.autograd.grad(attend_spelled_out(*wide, 0.2).sum(), wide)
    assert error(found[2], expected[2]) < STEP


def test_it_is_what_runs_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = inputs((2, 3, 5, 7, 32))
    with torch.profiler.profile() as profile:
        attend(q, k, v, 0.2)
    assert "foveate_recipes::attend" in {event.key for event in profile.key_averages()}
    counted = flops_of(lambda: attend(q, k, v, 0.2))
    monkeypatch.setattr(attention, "_has_amx", lambda: False)
    assert flops_of(lambda: attend(q, k, v, 0.2)) == counted == 4 * 2 * 3 * 5 * 7 * 32


def test_the_compiler_sees_one_operator_with_these_shapes_and_strides() -> None:
    q, k, v, _ = (x.requires_grad_() for x in inputs((2, 3, 5, 7, 32)))
    seen, checks = torch.full((2, 5), 4, dtype=torch.int32), ("test_schema", "test_faketensor")
    torch.library.opcheck(attention._attend, (q, k, v, seen, 0.2), test_utils=checks)
