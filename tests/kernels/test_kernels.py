"""Every kernel against plain arithmetic in float64, on fresh random inputs, in C and in plain torch."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from foveate.core.rows import Rows
from foveate.kernels import native
from foveate.kernels.activation import gelu
from foveate.kernels.attention import attend_group
from foveate.kernels.heads import unit_rotated
from foveate.kernels.linear import Linear, linear
from foveate.kernels.norm import norm_modulate
from foveate.kernels.residual import add_gated_, gated
from foveate.kernels.resize import add_resized_, resize_matrix, resize_tokens
from foveate.pipeline.pipeline import Pipeline
from tests.kernels.paths import ATTENTION_PATHS, take_path

DTYPES = (torch.float32, torch.bfloat16)
RAGGED = Rows((3, 0, 40, 1))


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch) -> str:
    """Runs a test on both paths; C needs a processor that has the instructions."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    return request.param


@pytest.fixture(params=ATTENTION_PATHS)
def attention_path(request, monkeypatch) -> str:
    """Runs a test of attention on each of its paths."""
    return take_path(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def inference():
    """The C code runs only where no gradients are wanted."""
    with torch.inference_mode():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    return 3e-6 if dtype is torch.float32 else 1.2e-2


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, margin: float = 1.0) -> None:
    scale = wanted.abs().max().item() or 1.0
    assert got.shape == wanted.shape
    assert (got.double() - wanted.double()).abs().max().item() <= margin * tolerance(dtype) * scale


def plain_attention(q_nND: Tensor, k_gNmD: Tensor, v_gNmD: Tensor, scale: float) -> Tensor:
    """One query of one head after the other."""
    rows, heads, _, width = k_gNmD.shape
    q = q_nND.double().unflatten(0, (rows, -1))
    out = torch.zeros(q.shape, dtype=torch.float64)
    for r in range(rows):
        for h in range(heads):
            scores = scale * q[r, :, h] @ k_gNmD[r, h].double().T
            weights = (scores - scores.max(-1, keepdim=True).values).exp()
            out[r, :, h] = weights / weights.sum(-1, keepdim=True) @ v_gNmD[r, h].double()
    return out.flatten(0, 1).view(-1, heads, width)


ATTENTION_SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 32),
    (1, 2, 97, 130, 96),
    (3, 2, 13, 513, 64),
    (2, 1, 100, 1100, 128),
    (1, 3, 6, 64, 48),
    (1, 1, 2, 33, 224),
    (2, 2, 4, 9, 20),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention_equals_plain_arithmetic(attention_path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, heads, queries, keys, width = shape
    q = random(rows * queries, heads, width, dtype=dtype)
    k, v = random(rows, heads, keys, width, dtype=dtype), random(rows, heads, keys, width, dtype=dtype)
    # A score of 20 that is rounded in float32 changes its weight by 20 roundings.
    assert_near(
        attend_group(q, k, v, 0.4), plain_attention(q, k, v, 0.4), dtype, margin=10.0 if dtype is torch.float32 else 1.0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_scores_far_apart(attention_path: str, dtype: torch.dtype) -> None:
    """The maximum comes last, so every earlier block shrinks to nothing; and equal scores give the mean."""
    q, k, v = random(4, 1, 32, dtype=dtype), random(1, 1, 1200, 32, dtype=dtype), random(1, 1, 1200, 32, dtype=dtype)
    k[0, 0, -1] = q[0, 0] * 2
    assert_near(attend_group(q, k, v, 2.0), plain_attention(q, k, v, 2.0), dtype)
    same = k[:, :, :1].expand(-1, -1, 1200, -1).contiguous()
    mean = v.double().mean(2).expand(4, -1, -1)
    assert_near(attend_group(q, same, v, 1.0), mean, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_reads_strided_queries_and_a_part_of_a_cache(attention_path: str, dtype: torch.dtype) -> None:
    qkv = random(24, 3, 4, 32, dtype=dtype)
    cache_k, cache_v = random(2, 4, 90, 32, dtype=dtype), random(2, 4, 90, 32, dtype=dtype)
    q, k, v = qkv[:, 0], cache_k[:, :, :70], cache_v[:, :, :70]
    assert_near(attend_group(q, k, v, 0.3), plain_attention(q, k, v, 0.3), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_does_not_see_what_stands_beside_it(attention_path: str, dtype: torch.dtype) -> None:
    """Bit for bit the same in a batch of rows, between other queries, and on one thread."""
    if attention_path == "torch":
        pytest.skip("torch's attention promises it of whole rows only")
    q, k, v = (random(3, 50, 2, 64, dtype=dtype) for _ in range(3))
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    together = attend_group(q.flatten(0, 1), k, v, 0.5).unflatten(0, (3, -1))
    threads = torch.get_num_threads()
    for row in range(3):
        torch.set_num_threads(1)
        try:
            alone = attend_group(q[row, 7:20], k[row : row + 1], v[row : row + 1], 0.5)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(alone, together[row, 7:20])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 20, 96, 768])
def test_norm_equals_plain_arithmetic(path: str, width: int, dtype: torch.dtype) -> None:
    x = random(RAGGED.total, width) * 3 + 1
    modulation = random(4, 6, width)
    factor, shift = modulation[:, 2], modulation[:, 4]
    rows = RAGGED.row_of_token(torch.device("cpu"))
    x64 = x.double()
    normed = (x64 - x64.mean(-1, keepdim=True)) / (x64.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    wanted = normed * factor.double()[rows] + shift.double()[rows]
    before = x.clone()
    got = norm_modulate(x, factor, shift, RAGGED, dtype)
    assert got.dtype is dtype
    assert_near(got, wanted, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("width", [16, 21, 768])
def test_gated_residual_has_the_bits_of_plain_torch(path: str, width: int, has_gate: bool, dtype: torch.dtype) -> None:
    x, change = random(RAGGED.total, width), random(RAGGED.total, width, dtype=dtype)
    gate = random(4, 6, width)[:, 1] if has_gate else None
    factor = 1.0 if gate is None else gate[RAGGED.row_of_token(torch.device("cpu"))]
    wanted = x + change.float() * factor
    assert torch.equal(x + gated(change, gate, RAGGED), wanted)
    add_gated_(x, change, gate, RAGGED)
    assert torch.equal(x, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("width", [16, 32, 40, 96])
def test_heads_equal_plain_arithmetic(path: str, width: int, rotates: bool, dtype: torch.dtype) -> None:
    tokens, heads = 11, 3
    qkv = random(tokens, 3, heads, width, dtype=dtype)
    gain = torch.rand(heads) * 5 + 0.1
    angle = random(tokens, width // 2) * 3
    rotation = torch.cat((angle.cos(), angle.sin()), -1) if rotates else torch.empty(tokens, 0)
    wanted = []
    for part, length in ((0, gain.double()), (1, torch.ones(heads).double())):
        x = qkv[:, part].double()
        x = x / x.norm(dim=-1, keepdim=True) * length[:, None]
        if rotates:
            turn = torch.polar(torch.ones_like(angle).double(), angle.double())[:, None]
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        wanted.append(x)
    values = qkv[:, 2].clone()
    q, k, v = unit_rotated(qkv, gain, rotation)
    assert_near(q, wanted[0], dtype)
    assert_near(k, wanted[1], dtype)
    assert torch.equal(v, values)


def test_heads_of_zero_stay_zero(path: str) -> None:
    q, k, _ = unit_rotated(torch.zeros(2, 3, 1, 16), torch.ones(1), torch.empty(2, 0))
    assert not q.any()
    assert not k.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_equals_plain_arithmetic(path: str, dtype: torch.dtype) -> None:
    x = torch.cat((random(1000) * 4, torch.tensor([0.0, -0.0, 60.0, -60.0, 1e-20, 3e4, -3e4]))).to(dtype)[None]
    wanted = [[0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x[0].tolist()]]
    got = gelu(x.clone())
    error = (got.double() - torch.tensor(wanted, dtype=torch.float64)).abs()
    assert (error <= tolerance(dtype) * x.double().abs().clamp_min(1e-2)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [(1, 1), (2, 3), (5, 4), (6, 6)], ids=str)
@pytest.mark.parametrize("grow", [(0, 0), (0, 3), (7, 1), (30, 26)], ids=str)
def test_resizing_equals_bilinear_interpolation(
    path: str, grow: tuple[int, int], source: tuple[int, int], dtype: torch.dtype
) -> None:
    grid = (source[0] + grow[0], source[1] + grow[1])
    tokens = random(2, source[0] * source[1], 21, dtype=dtype)
    maps = tokens.double().transpose(1, 2).unflatten(-1, source)
    wanted = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    resized = resize_tokens(tokens, source, grid)
    assert resized.dtype is dtype
    assert_near(resized, wanted, dtype)
    x = random(2 * grid[0] * grid[1], 21)
    expected = x + resized.flatten(0, 1)
    add_resized_(x, tokens, source, grid)
    assert torch.equal(x, expected)
    assert torch.allclose(resize_matrix(grid[0], source[0], tokens.device).sum(-1), torch.ones(grid[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_plain_arithmetic(has_bias: bool, dtype: torch.dtype) -> None:
    layer = Linear(70, 50, bias=has_bias).to(dtype)
    init_weights(layer)
    for shape in ((1, 70), (33, 70), (2, 5, 70), (0, 70)):
        x = random(*shape, dtype=dtype)
        bias = layer.bias.double() if has_bias else 0.0
        wanted = x.double() @ layer.weight.double().T + bias
        assert layer(x).shape == wanted.shape
        if x.numel():
            assert_near(layer(x), wanted, dtype)
            assert_near(linear(x, layer.weight, layer.bias), wanted, dtype)


def test_gradients_and_autocast_take_the_way_of_torch() -> None:
    with torch.inference_mode(mode=False), torch.enable_grad():
        layer, x = Linear(8, 8), torch.randn(3, 8, requires_grad=True)
        y = gelu(layer(norm_modulate(x, torch.ones(1, 8), torch.zeros(1, 8), Rows((3,)), torch.float32)))
        y.sum().backward()
        assert x.grad is not None
        assert layer.weight.grad is not None
    layer = Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype is torch.bfloat16


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


DESCRIBE = "import logging; logging.basicConfig(); from foveate.kernels import native; print(native.describe())"


def test_the_library_is_compiled_once_and_kept(tmp_path, path: str) -> None:
    if path == "torch":
        pytest.skip("nothing is compiled on this path")
    assert run_python(DESCRIBE, FOVEATE_CACHE=str(tmp_path)).stdout.strip() == native.describe()
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert run_python(DESCRIBE, FOVEATE_CACHE=str(tmp_path)).stdout.strip() == native.describe()
    assert [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [stamp]
    # Another processor or compiler gets a library of its own.
    assert run_python(DESCRIBE, FOVEATE_CACHE=str(tmp_path), CC="gcc -O1").stdout.strip() == native.describe()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.soak
def test_a_library_that_was_compiled_ahead_needs_no_compiler_and_no_folder(tmp_path, monkeypatch) -> None:
    if native.library() is None:
        pytest.skip(f"no C kernels on this machine: {native.describe()}")
    native.compile_ahead(tmp_path)
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("FOVEATE_CACHE", "/proc/none")
    monkeypatch.setenv("FOVEATE_KERNELS", str(tmp_path))
    values = "\nimport torch; from foveate.kernels.activation import gelu\n"
    values += "with torch.inference_mode(): print(gelu(torch.arange(-3, 3, 0.1)[None]).tolist())"
    wanted = gelu(torch.arange(-3, 3, 0.1)[None]).tolist()
    assert run_python(DESCRIBE + values).stdout == f"{native.describe()}\n{wanted}\n"


def test_a_library_of_another_version_is_not_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("FOVEATE_KERNELS", str(tmp_path))
    (tmp_path / "kernels-any-of-another-version.so").write_bytes(b"")
    with pytest.raises(native._PlainError) as raised:
        native._compiled()
    assert raised.value.plain.reason == "FOVEATE_KERNELS holds no library of this version"
    (tmp_path / native._name_ahead()).write_bytes(b"")
    assert native._compiled() == tmp_path / native._name_ahead()
    with pytest.raises(FoveateError, match="install gcc, or set CC"):
        native.compile_ahead(tmp_path)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("wanted", [SDPBackend.MATH, pytest.param(SDPBackend.FLASH_ATTENTION, marks=pytest.mark.soak)])
def test_the_switch_of_torch_chooses_the_attention_of_a_call(toy_pipe: Pipeline, wanted: SDPBackend) -> None:
    names = {
        SDPBackend.MATH: "aten::_scaled_dot_product_attention_math",
        SDPBackend.FLASH_ATTENTION: "aten::_scaled_dot_product_flash_attention_for_cpu",
    }
    with torch.profiler.profile() as profile, sdpa_kernel(wanted):
        toy_pipe("a red apple", seed=0)
    ran = {event.key for event in profile.key_averages()}
    assert ran & set(names.values()) == {names[wanted]}
