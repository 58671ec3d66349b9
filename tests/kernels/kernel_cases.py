"""Every Triton kernel against its twin in plain torch, on fresh random inputs: on a GPU, or by Triton's interpreter.

`test_gpu.py` runs this file in a process of its own: the interpreter is switched on before triton is imported, and
shape checks would wrap the kernels. Called directly on a machine with a GPU it tests the kernels there. Twins run in
float64 where they can, so that errors are those of the kernel.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.rows import Rows
from foveate.kernels import bits as plain_bits
from foveate.kernels import heads as plain_heads
from foveate.kernels import norm as plain_norm
from foveate.kernels import residual as plain_residual
from foveate.kernels.gpu import bits, energy, heads, launch, norm, residual
from foveate.policies.ld_pruning import detail_energy, smooth_energy
from foveate.policies.registry import load_policy
from tests.toys import label_request, make_request, run, toy, toy_var

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="toys lie on the CPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error that rounding to a dtype may make."""
COUNTS = [(1,), (5,), (2, 2, 2), (3, 0, 4), (0,), (1, 7, 2, 3)]
WIDTHS = [1, 12, 64, 100, 129]


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest):
    """Seeds by the name of the case, so that every case has inputs of its own."""
    torch.manual_seed(sum(map(ord, request.node.name)))
    with torch.inference_mode(), torch.device(DEVICE), launch.enabled(True):
        yield


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return found.shape == expected.shape and torch.allclose(
        found.double(), expected.double(), rtol=4 * STEP[dtype], atol=4 * STEP[dtype]
    )


def modulation(rows: Rows, width: int) -> tuple[Tensor, Tensor]:
    """A factor and a shift that lie in a larger tensor, as the prepared modulation does."""
    both_R6C = torch.randn(len(rows.counts), 6, width)
    return both_R6C[:, 2], both_R6C[:, 5]


def normed(x_nC: Tensor, factor_RC: Tensor, shift_RC: Tensor, rows: Rows, eps: float) -> Tensor:
    out = F.layer_norm(x_nC.double(), x_nC.shape[-1:], eps=eps)
    return out * rows.spread(factor_RC.double()) + rows.spread(shift_RC.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width: int, counts: tuple[int, ...], dtype: torch.dtype):
    rows = Rows(counts)
    x_nC = torch.randn(rows.total, 2 * width)[:, :width] * 3 + 1
    factor_RC, shift_RC = modulation(rows, width)
    found = norm.norm_modulate(x_nC, factor_RC, shift_RC, rows, dtype, 1e-6)
    assert found.dtype is dtype
    assert close(found, normed(x_nC, factor_RC, shift_RC, rows, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("has_gate", [True, False])
def test_residual(counts: tuple[int, ...], dtype: torch.dtype, has_gate: bool):
    rows, width = Rows(counts), 77
    x_nC = torch.randn(rows.total, width)
    change_nC = torch.randn(rows.total, width).to(dtype)
    gate_RC = modulation(rows, width)[0] if has_gate else None
    gate_nC = 1.0 if gate_RC is None else rows.spread(gate_RC.double())
    expected = x_nC.double() + change_nC.double() * gate_nC
    residual.add_gated_(x_nC, change_nC, gate_RC, rows)
    assert close(x_nC, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 3, 20), (5, 4, 16), (0, 2, 8), (2, 7, 64)], ids=str)
@pytest.mark.parametrize("rotates", [True, False])
def test_heads(shape: tuple[int, int, int], dtype: torch.dtype, rotates: bool):
    num_tokens, num_heads, width = shape
    qkv_n3ND = torch.randn(num_tokens, 3, num_heads, width).to(dtype)
    gain_N = torch.rand(num_heads) * 5 + 0.5
    angles = torch.randn(num_tokens, width // 2)
    rotation_nD = torch.cat((angles.cos(), angles.sin()), dim=-1) if rotates else torch.empty(num_tokens, 0)
    wide = qkv_n3ND.double()
    expected = F.normalize(wide[:, :2], dim=-1)
    expected[:, 0] *= gain_N[:, None].double()
    if rotates and num_tokens:
        expected = torch.stack([plain_heads.rotate(part, rotation_nD.double()) for part in expected.unbind(1)], dim=1)
    values = qkv_n3ND[:, 2].clone()
    heads.unit_rotated_(qkv_n3ND, gain_N, rotation_nD)
    assert close(qkv_n3ND[:, :2] / 6, expected / 6, dtype)
    assert torch.equal(qkv_n3ND[:, 2], values)


def test_heads_of_nothing_have_length_zero():
    qkv_n3ND = torch.zeros(2, 3, 2, 8)
    heads.unit_rotated_(qkv_n3ND, torch.ones(2), torch.empty(2, 0))
    assert not qkv_n3ND.any()


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.5, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 32), (0, 4)], ids=str)
def test_bits(shape: tuple[int, int], top_p: float):
    """Equal bits wherever the draw, and top-p, are clear of a tie within float error."""
    logits_kd2, u_kd = torch.randn(*shape, 2) * 3, torch.rand(shape)
    found = bits.sample_bits(logits_kd2, u_kd, top_p)
    p_kd2 = logits_kd2.double().softmax(-1)
    is_ruled = (p_kd2.amin(-1) - 1 + top_p).abs() > 1e-5
    is_clear = ((u_kd - p_kd2[..., 1]).abs() > 1e-5) & (is_ruled | (top_p == 1))
    assert found.dtype is torch.int64
    assert is_clear.double().mean() > 0.9 or not is_clear.numel()
    twin = (u_kd < two_values(logits_kd2, top_p)[..., 1]).long()
    assert torch.equal(found[is_clear], twin[is_clear])


def two_values(logits_kd2: Tensor, top_p: float) -> Tensor:
    """The twin: probabilities after the general rule."""
    return (plain_bits.keep_two(logits_kd2, top_p) if top_p > 0 else logits_kd2).softmax(-1)


def test_equal_logits_keep_the_first_value():
    even = torch.zeros(3, 2, 2)
    u_kd = torch.rand(3, 2)
    assert not bits.sample_bits(even, u_kd, 0.4).any()
    assert not (u_kd < two_values(even, 0.4)[..., 1]).any()
    assert torch.equal(bits.sample_bits(even, u_kd, 0.0), (u_kd < 0.5).long())


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 4, 6, 6), (1, 2, 5, 7), (2, 3, 1, 8), (1, 8, 31, 24)], ids=str)
def test_energy(shape: tuple[int, ...]):
    residual_BZhw = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1)
    found = energy.smooth_energy(residual_BZhw)
    assert found.dtype is torch.float64
    assert torch.allclose(found, smooth_energy(residual_BZhw), rtol=1e-12)


def test_energy_of_codes_is_exact():
    """Of +-1/sqrt(d) codes both sum the same numbers: the kept sets of LD-Pruning cannot differ by ties."""
    codes_BZhw = torch.where(torch.rand(1, 4, 12, 12) < 0.5, 0.5, -0.5)
    assert torch.allclose(energy.smooth_energy(codes_BZhw), smooth_energy(codes_BZhw), rtol=1e-15, atol=0)


# Where they are used


def test_the_functions_of_the_library_use_the_kernels(monkeypatch: pytest.MonkeyPatch):
    """Each of them asks for its kernel, and only where no gradients are wanted."""
    asked: list[str] = []
    original = launch.kernel
    monkeypatch.setattr(launch, "kernel", lambda name: asked.append(name) or original(name))
    rows = Rows((2, 1))
    x_nC, (factor_RC, shift_RC) = torch.randn(3, 16), modulation(rows, 16)

    def all_of_them():
        plain_norm.norm_modulate(x_nC, factor_RC, shift_RC, rows, torch.float32)
        plain_residual.add_gated_(x_nC.clone(), x_nC.bfloat16(), factor_RC, rows)
        plain_heads.unit_rotated(torch.randn(3, 3, 2, 8), torch.ones(2), torch.empty(3, 0))
        plain_bits.sample_bits(torch.randn(3, 4, 2), torch.rand(3, 4), 0.9)
        detail_energy(torch.randn(1, 2, 4, 4), (6, 6))

    monkeypatch.setattr(launch, "_checked", {})
    all_of_them()
    names = ["norm", "residual", "heads", "bits", "energy"]
    assert asked == [name for name in names for _ in range(2)], "each is checked first"
    asked.clear()
    all_of_them()
    assert asked == names
    assert launch.warnings() == ()
    with launch.enabled(False):
        asked.clear()
        all_of_them()
        assert asked == []
    with torch.inference_mode(mode=False), torch.enable_grad():
        x_nC, (factor_RC, shift_RC) = torch.randn(3, 16), modulation(rows, 16)
        all_of_them()
    assert asked == []


@ON_CPU
@pytest.mark.parametrize("spec", ["full", "ld-pruning"])
def test_engine_draws_the_same_codes(spec: str):
    """Whole requests on a toy: latents agree, so no code of any scale differs.

    No policy that ranks changes: enlarged ones tie within float error, and ties go either way.
    """
    subject = toy("square")
    request = make_request(subject.schedule, (3, 7), (5, 9))
    with_kernels = run(subject, load_policy(spec), request, uses_triton=True)
    assert launch.warnings() == ()
    without = run(subject, load_policy(spec), request)
    assert torch.allclose(with_kernels.f_hat, without.f_hat, atol=1e-4)
    assert not torch.equal(with_kernels.choices[4].logits[0], without.choices[4].logits[0])


@ON_CPU
def test_engine_draws_the_same_ids():
    subject = toy_var()
    request = label_request(subject.schedule, (3,), (1,))
    with_kernels = run(subject, load_policy("uniform-depth"), request, uses_triton=True)
    assert torch.allclose(with_kernels.f_hat, run(subject, load_policy("uniform-depth"), request).f_hat, atol=1e-4)
