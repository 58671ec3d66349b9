"""Log-sum-exp, merging and entropy of attention against a naive softmax in float64, in C and in plain torch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.kernels import native
from foveate.kernels.attention import attend_group, attend_group_copies, attend_group_lse, entropy
from tests.kernels.paths import take_path

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 32),
    (1, 2, 97, 130, 96),
    (3, 2, 13, 513, 64),
    (2, 1, 100, 1100, 128),
    (1, 3, 200, 512, 48),
    (1, 2, 3, 9, 7),
    (2, 2, 40, 900, 20),
]
"""Rows, heads, queries, keys, width; the C code takes multiples of 16 only."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """The C code runs only where no gradients are wanted."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=["amx", "native", "flash", "scores"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test in C with AMX and without, with torch's flash kernel for CPUs, and with scores computed once more."""
    path = take_path(request.param, monkeypatch)
    if path in ("amx", "native"):
        yield path
        return
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if path == "flash" else SDPBackend.MATH):
        yield path


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Runs a block on so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values; `spread` multiplies the queries, and so the scores."""
    rows, heads, queries, keys, width = shape
    q_nND = (torch.randn(rows * queries, heads, width) * spread).to(dtype)
    return q_nND, *(torch.randn(rows, heads, keys, width).to(dtype) for _ in range(2))


def naive(q_nND: Tensor, k_gNmD: Tensor, v_gNmD: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of all three: attention, log-sum-exp and entropy, one head of one row after the other in float64."""
    out = torch.empty(q_nND.shape, dtype=torch.float64)
    lse, spread = torch.empty_like(out[..., 0]), torch.empty_like(out[..., 0])
    for row, tokens in enumerate(torch.arange(len(q_nND)).chunk(len(k_gNmD))):
        for head in range(q_nND.shape[1]):
            scores_lm = scale * q_nND[tokens, head].double() @ k_gNmD[row, head].double().T
            top_l1 = scores_lm.max(-1, keepdim=True).values
            weights_lm = (scores_lm - top_l1).exp()
            lse[tokens, head] = (top_l1 + weights_lm.sum(-1, keepdim=True).log()).squeeze(-1)
            weights_lm /= weights_lm.sum(-1, keepdim=True)
            out[tokens, head] = weights_lm @ v_gNmD[row, head].double()
            spread[tokens, head] = -torch.special.xlogy(weights_lm, weights_lm).sum(-1)
    return out, lse, spread


def largest_score(q_nND: Tensor, k_gNmD: Tensor, scale: float) -> float:
    """A bound that errors grow with: the longest query times the longest key."""
    return scale * q_nND.double().norm(dim=-1).max().item() * k_gNmD.double().norm(dim=-1).max().item()


def assert_near(got: Tensor, wanted: Tensor, margin: float) -> None:
    assert got.dtype is torch.float32
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max().item() <= margin


def lse_step(path: str, q_nND: Tensor) -> float:
    """Error of a log-sum-exp per unit of the largest score; torch's flash kernel is coarser in bfloat16."""
    is_flash = path == "flash" or (path in ("amx", "native") and q_nND.shape[-1] % 16 != 0)
    return 1e-4 if is_flash and q_nND.dtype is torch.bfloat16 else 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_log_sum_exp_equals_plain_arithmetic(
    path: str, num_threads: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v = inputs(shape, dtype)
    with threads(num_threads):
        out, lse = attend_group_lse(q, k, v, 0.3)
        assert torch.equal(out, attend_group(q, k, v, 0.3))
    assert_near(lse, naive(q, k, v, 0.3)[1], lse_step(path, q) * max(1.0, largest_score(q, k, 0.3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1e4])
def test_log_sum_exp_of_extreme_scores(path: str, spread: float, dtype: torch.dtype) -> None:
    """Equal scores give log m; scores of thousands neither overflow nor vanish, and the largest may come last."""
    q, k, v = inputs((2, 2, 9, 1200, 32), dtype, spread)
    k[:, :, -1] *= 3
    out, lse = attend_group_lse(q, k, v, 1.0)
    assert_near(lse, naive(q, k, v, 1.0)[1], lse_step(path, q) * max(1.0, largest_score(q, k, 1.0)))
    assert spread > 0 or (lse - math.log(1200)).abs().max() < 2 * lse_step(path, q)
    assert torch.equal(out, attend_group(q, k, v, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_reads_strided_queries_and_a_part_of_a_cache(path: str, dtype: torch.dtype) -> None:
    qkv, cache_k, cache_v = (torch.randn(shape).to(dtype) for shape in ((24, 3, 4, 32), (2, 4, 90, 32), (2, 4, 90, 32)))
    q, k, v = qkv[:, 0], cache_k[:, :, :70], cache_v[:, :, :70]
    out, lse = attend_group_lse(q, k, v, 0.3)
    assert_near(lse, naive(q, k, v, 0.3)[1], lse_step(path, q) * largest_score(q, k, 0.3))
    assert torch.equal(out, attend_group(q, k, v, 0.3))


def test_each_path_is_the_one_that_runs(path: str) -> None:
    """So that no case above is green by running another path: names of the operators of torch."""
    q, k, v = inputs((1, 2, 5, 9, 32), torch.float32)
    with torch.profiler.profile() as profile:
        attend_group_lse(q, k, v, 0.3)
    ran = {event.key for event in profile.key_averages()}
    names = {"flash": "aten::_scaled_dot_product_flash_attention_for_cpu", "scores": "aten::logsumexp"}
    assert ran & set(names.values()) == ({names[path]} if path in names else set())


@pytest.mark.parametrize("name", ["amx", "native"])
def test_each_c_path_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_path(name, monkeypatch)
    library, called = native.loaded(), []

    class Spy:
        def __getattr__(self, function: str) -> object:
            called.append(function)
            return getattr(library, function)

    monkeypatch.setattr(native, "loaded", Spy)
    for dtype in DTYPES:
        attend_group(*inputs((1, 2, 5, 9, 32), dtype), 0.3)
    assert called == ["foveate_attend_f32", f"foveate_attend_{'amx' if name == 'amx' else 'bf16'}"]


def test_gradients_flow_through_the_log_sum_exp() -> None:
    """Torch's flash kernel for CPUs has none for it: the derivative by a query is the scaled mean key."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        q, k, v = inputs((1, 2, 5, 9, 32), torch.float32)
        out, lse = attend_group_lse(q.requires_grad_(), k, v, 0.3)
        (gradient,) = torch.autograd.grad(lse.sum(), q)
        assert torch.equal(out, attend_group(q, k, v, 0.3))
    assert_near(gradient, 0.3 * naive(q.detach(), k, k, 0.3)[0], 1e-5)


# Entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy_equals_plain_arithmetic(path: str, shape: tuple[int, ...], spread: float, dtype: torch.dtype) -> None:
    q, k, _ = inputs(shape, dtype, spread)
    found, largest = entropy(q, k, 0.3), largest_score(q, k, 0.3)
    assert_near(found, naive(q, k, k, 0.3)[2], max(1e-6, (1e-6 if dtype is torch.float32 else 2**-8) * largest))
    assert found.min() >= 0.0
    assert found.max() <= math.log(shape[3]) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entropy_of_a_flat_and_of_a_sharp_softmax(path: str, dtype: torch.dtype) -> None:
    """The two ends that have a name: log m for equal scores, and zero for one key that takes all weight."""
    q, k, _ = inputs((1, 2, 4, 600, 32), dtype)
    same = k[:, :, :1].expand(-1, -1, 600, -1).contiguous()
    # Equal numbers, added one after the other, are rounded the same way each time.
    margin = (5e-6 if dtype is torch.float32 else 2**-8) * largest_score(q, same, 0.3)
    assert_near(entropy(q, same, 0.3), torch.full((4, 2), math.log(600), dtype=torch.float64), margin)
    k[:, :, 77] = 50 * q[0]
    step = 1e-6 if dtype is torch.float32 else 2**-8
    assert_near(entropy(q[:1], k, 1.0), torch.zeros(1, 2, dtype=torch.float64), step * largest_score(q[:1], k, 1.0))


# A first key that stands for many


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [2, 300])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_a_first_key_for_many_equals_so_many_keys(path: str, shape: tuple[int, ...], copies: int, dtype: torch.dtype):
    q, k, v = inputs(shape, dtype)
    many = [torch.cat((x[:, :, :1].expand(-1, -1, copies - 1, -1), x), dim=2) for x in (k, v)]
    found = attend_group_copies(q, k, v, 0.3, copies)
    assert found.dtype is dtype
    assert_near(found.float(), naive(q, *many, 0.3)[0], 1e-5 if dtype is torch.float32 else 3e-2)
    assert (found.float() - attend_group(q, k, v, 0.3).float()).abs().max() > 1e-2


def test_scores_of_hundreds_do_not_overflow(path: str) -> None:
    q, k, v = inputs((1, 2, 9, 40, 32), torch.float32, 1e3)
    assert attend_group_copies(q, k, v, 1.0, 300).isfinite().all()


def test_where_gradients_are_wanted_the_key_is_repeated() -> None:
    """The way of a GPU, too."""
    q, k, v = inputs((2, 2, 5, 9, 32), torch.float32)
    expected = attend_group_copies(q, k, v, 0.3, 300)
    with torch.inference_mode(mode=False), torch.enable_grad():
        q, k, v = (x.clone() for x in (q, k, v))
        assert_near(attend_group_copies(q, k, v, 0.3, 300).detach(), expected.double(), 1e-5)
