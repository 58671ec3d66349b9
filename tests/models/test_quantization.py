"""Int8 and fp8 weights: which layers, how far off, how many bytes; on the toys of every family."""

import copy
from importlib import util

import pytest
import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from foveate.kernels.linear import Linear
from foveate.models.infinity import Infinity
from foveate.models.switti import Switti, SwittiConfig
from foveate.models.var import VAR
from foveate.policies.registry import load_policy
from foveate.weights.quantization import (
    check_quantization,
    linears_of,
    quantize_blocks,
    quantized_bytes,
    stored_bytes,
)
from tests.toys import label_request, make_var, randomise, run, tiny_model, toy, toy_var

KINDS = ("int8", "fp8")


def make_switti() -> Switti:
    config = SwittiConfig(
        depth=2, width=64, heads=2, codebook_size=48, latent_channels=8, num_levels=5, text_width=32, pooled_width=24
    )
    model = Switti(config)
    randomise(model, seed=9)
    return model.requires_grad_(requires_grad=False).eval()


def blocks_of(model: Infinity | VAR | Switti) -> list[nn.Module]:
    return [model.block(i) for i in range(model.shape.num_blocks)]


MODELS = {
    "infinity": (tiny_model, {"sa.mat_qkv", "sa.proj", "ca.mat_q", "ca.mat_kv", "ca.proj", "ffn.fc1", "ffn.fc2"}),
    "var": (make_var, {"attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2"}),
    "switti": (
        make_switti,
        {"attn.to_qkv", "attn.proj", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.proj"}
        | {"ffn.up_proj", "ffn.gate_proj", "ffn.down_proj"},
    ),
}
"""Per family its toy and the layers of a block that are quantised."""


def quantized(name: str, kind: str) -> tuple[Infinity | VAR | Switti, Infinity | VAR | Switti]:
    before = MODELS[name][0]()
    after = copy.deepcopy(before)
    quantize_blocks(blocks_of(after), kind)
    return before, after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [3, 300])
def test_layers_widened_for_many_tokens_compute_the_same(kind: str, num_tokens: int):
    generator = torch.Generator().manual_seed(0)
    before = Linear(64, 48).requires_grad_(requires_grad=False)
    init_weights(before)
    x = torch.randn(num_tokens, 64, generator=generator)
    after = copy.deepcopy(before)
    quantize_blocks([after], kind)
    with torch.inference_mode():
        ours, torchs = after(x), torch.nn.functional.linear(x, after.weight, after.bias)
        assert torch.allclose(ours, torchs, atol=1e-5, rtol=1e-5)
        assert not torch.equal(ours, before(x))


def is_quantized(tensor: Tensor) -> bool:
    return type(tensor.data) is not Tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_only_the_linears_of_the_blocks_change(name: str, kind: str) -> None:
    before, after = quantized(name, kind)
    for old, new in zip(blocks_of(before), blocks_of(after), strict=True):
        changed = {key.removesuffix(".weight") for key, p in new.named_parameters() if is_quantized(p)}
        assert changed == MODELS[name][1]
        for key, parameter in old.named_parameters():
            assert is_quantized(new.get_parameter(key)) or torch.equal(new.get_parameter(key), parameter)
    inside = {id(p) for block in blocks_of(after) for p in block.parameters()}
    others = {key: p for key, p in after.named_parameters() if id(p) not in inside}
    assert {"word_embed.weight", "head.weight", "pos_start"} <= set(others)
    assert all(torch.equal(p, before.get_parameter(key)) for key, p in others.items())
    assert after.compute_dtype == before.compute_dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_stored_parts(name: str, kind: str) -> None:
    before, after = quantized(name, kind)
    counted = quantized_bytes(blocks_of(before), kind)
    stored = [sum(stored_bytes(p) for p in model.parameters()) for model in (before, after)]
    assert stored[0] == sum(p.nbytes for p in before.parameters())
    assert stored[0] - stored[1] == 4 * counted["parameters"] - counted["bytes"]
    assert counted["bytes"] < 0.4 * 4 * counted["parameters"]


def test_int8_rounds_to_127_steps_of_the_largest_weight_of_an_output() -> None:
    before, after = quantized("infinity", "int8")
    for old, new in zip(blocks_of(before), blocks_of(after), strict=True):
        for plain, linear in zip(linears_of(old), linears_of(new), strict=True):
            step = plain.weight.abs().amax(1, keepdim=True) / 127
            off = (linear(torch.eye(plain.in_features)) - plain(torch.eye(plain.in_features))).T.abs()
            assert bool((off <= 0.51 * step + 1e-6).all())
            assert float(off.max()) > 0


def test_fp8_rounds_to_three_bits_of_mantissa() -> None:
    before, after = quantized("infinity", "fp8")
    plain, linear = next(linears_of(blocks_of(before)[0])), next(linears_of(blocks_of(after)[0]))
    largest = plain.weight.abs().amax(1, keepdim=True)
    off = (linear.weight.dequantize() - plain.weight).abs()
    # Half a step: 1/16 of a normal number; below the normal ones the step stays that of 2^-6, of 448 in all.
    assert bool((off <= (plain.weight.abs() / 16).maximum(largest / 448 * 2**-10) * 1.01).all())
    assert float((off / plain.weight.abs()).max()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_draws_and_another_picture(kind: str) -> None:
    for subject, request_of, make in ((toy("square"), None, tiny_model), (toy_var(), label_request, make_var)):
        model = make()
        quantize_blocks(blocks_of(model), kind)
        request = None if request_of is None else request_of(subject.schedule)
        full, found = run(subject, load_policy("full"), request), run(subject, load_policy("full"), request, model)
        logits, own = full.choices[0].logits[0], found.choices[0].logits[0]
        assert not torch.equal(logits, own)
        assert float((own - logits).std() / logits.std()) < (0.05 if kind == "int8" else 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_what_is_computed_in(kind: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(32, 64).to(dtype).requires_grad_(requires_grad=False)
    plain = copy.deepcopy(linear)
    quantize_blocks([nn.ModuleDict({"fc1": linear})], kind)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert linear.weight.dtype == linear(x).dtype == dtype
    assert stored_bytes(linear.weight) == 32 * 64 + 64 * (5 if kind == "int8" else 4)
    assert float((linear(x) - plain(x)).float().std() / plain(x).float().std()) < 0.1


def test_refusals_say_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FoveateError, match="no quantization 'int9'; did you mean int8"):
        check_quantization("int9")
    with pytest.raises(FoveateError, match="torchao cannot make float64 weights on cpu int8; take another dtype"):
        quantize_blocks([nn.Linear(4, 4, dtype=torch.float64).requires_grad_(requires_grad=False)], "int8")
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(FoveateError, match=r'pip install "foveate\[quantize\]"'):
        check_quantization("int8")
