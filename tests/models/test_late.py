"""Products in eight bits at the last scales: close to the plain ones; nothing else changes, and nothing before them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from foveate.core.errors import FoveateError
from foveate.engine.executor import Engine, LateBlocks
from foveate.kernels.fp8 import E4M3, Fp8Weight
from foveate.kernels.linear import Linear, linear
from foveate.models.late import check_fp8, late_blocks
from foveate.models.quantization import linears_of
from foveate.pipeline import Pipeline
from foveate.policies.registry import load_policy
from tests.models.test_quantization import MODELS, blocks_of
from tests.toys import make_request, toy


@pytest.mark.parametrize("num_tokens", [0, 1, 37, 300])
def test_products_agree_with_rounded_numbers_in_float64(num_tokens: int):
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(48, 64, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    x = torch.randn(num_tokens, 64, generator=generator) * torch.logspace(-2, 2, max(num_tokens, 1))[:num_tokens, None]
    bias = torch.randn(48, generator=generator).bfloat16()
    held = Fp8Weight.of(weight.bfloat16())
    out = linear(x.bfloat16(), held, bias)
    assert (out.shape, out.dtype) == ((num_tokens, 48), torch.bfloat16)
    scale = x.bfloat16().float().abs().amax(-1, keepdim=True) / 448 if num_tokens else torch.ones(0, 1)
    rounded = (x.bfloat16().float() / scale).to(E4M3).double() * scale.double()
    wide = held.codes_oi.double() * held.scale_1o.t().double()
    exact = rounded @ wide.t() + bias.double()
    bound = rounded.abs() @ wide.abs().t() + bias.double().abs()
    assert ((out.double() - exact).abs() <= 2**-7 * bound).all()


def test_a_row_of_zeros_stays_zero_and_a_row_does_not_depend_on_others():
    generator = torch.Generator().manual_seed(0)
    held = Fp8Weight.of(torch.randn(32, 64, generator=generator).bfloat16())
    x = torch.randn(5, 64, generator=generator).bfloat16()
    x[2] = 0
    out = linear(x, held)
    assert (out[2] == 0).all()
    assert torch.equal(linear(x[1:2], held), out[1:2])


@pytest.mark.parametrize("name", list(MODELS))
def test_twins_share_everything_but_the_weights_that_are_read_at_a_scale(name: str):
    make, _ = MODELS[name]
    model = make().to(torch.bfloat16)
    blocks = blocks_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for block, twin in zip(blocks, late_blocks(blocks), strict=True):
        rounded = {key for key, module in twin.named_modules() if isinstance(module.__dict__.get("weight"), Fp8Weight)}
        linears = set(linears_of(block))
        expected = {key for key, module in block.named_modules() if module in linears}
        assert rounded == {key for key in expected if not key.endswith("_kv") or key.endswith("mat_qkv")} != set()
        owned = dict(block.named_parameters())
        shared = dict(twin.named_parameters())
        assert all(shared[key] is owned[key] for key in shared)
        assert set(owned) - set(shared) == {f"{key}.weight" for key in rounded}
        assert not any(isinstance(module.__dict__.get("weight"), Fp8Weight) for module in block.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scales_before_the_last_ones_keep_their_bits():
    subject = toy("square", torch.bfloat16)
    bound = load_policy("full").bind(subject.schedule, subject.model.shape)
    twins = late_blocks([subject.model.block(i) for i in range(subject.num_blocks)])
    runs = [
        [step.f_hat_BZHW for step in Engine(subject.model, subject.tokenizer, late=late).run(bound, request)]
        for request in [replace(make_request(subject.schedule), wants_maps=False)]
        for late in (None, LateBlocks(num_scales=2, blocks=twins))
    ]
    same = [torch.equal(a, b) for a, b in zip(*runs, strict=True)]
    assert same == [True, True, True, False, False]


def test_the_option_draws_a_little_differently_and_is_recorded():
    plain, coarse = (Pipeline.from_pretrained("emoji", dtype="bfloat16", fp8_scales=count) for count in (0, 2))
    pictures = []
    for pipe in (plain, coarse):
        pipe.set_progress_bar_config(disable=True)
        out = pipe.generate("a red apple", seed=1, output_type="pt")
        pictures.append(out.images.float())
    assert out.config["fp8_scales"] == 2
    psnr = -10 * torch.log10((pictures[0] - pictures[1]).square().mean())
    assert 20 < psnr < 60


def test_what_does_not_go_together_is_refused():
    for options, message in (
        ({"fp8_scales": 2}, "fp8_scales needs dtype bfloat16, got float32"),
        ({"fp8_scales": -1, "dtype": "bfloat16"}, "fp8_scales must be 0 or more, got -1"),
        ({"fp8_scales": 2, "dtype": "bfloat16", "quantization": "int8"}, "leave it or quantization out"),
        ({"fp8_scales": 2, "dtype": "bfloat16", "offload": True}, "leave it or offload out"),
    ):
        with pytest.raises(FoveateError, match=message):
            Pipeline.from_pretrained("emoji", **options)
    with pytest.raises(FoveateError, match="bfloat16"):
        check_fp8(torch.float16, torch.device("cpu"))


def test_a_plain_layer_is_as_before():
    layer = Linear(8, 4).requires_grad_(requires_grad=False)
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
