"""Dtypes of a loaded model: a decoder of its own dtype, weights in int8 and fp8; loaded, generated, recorded."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foveate.bench.memory import weights_bytes
from foveate.core.errors import FoveateError
from foveate.families.loading import Precision
from foveate.families.memory import memory_need, transformer_bytes
from foveate.families.published import PUBLISHED
from foveate.families.spec import Defaults, ModelSpec
from foveate.models.infinity import InfinityConfig
from foveate.models.switti import SwittiConfig
from foveate.models.var import VARConfig
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.pipeline.provenance import regenerate, save_image
from foveate.policies.full import Full
from foveate.tokenizers.autoencoder import VQ_F16, AutoencoderConfig


def draw(pipe: Pipeline, **options: Any) -> PipelineOutput:
    return pipe("a red cat", seed=3, **options)


@pytest.fixture(scope="module")
def int8_pipe(toy_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(toy_folder, quantization="int8")


# The decoder


def test_decoder_has_a_dtype_of_its_own(toy_folder: Path, toy_pipe: Pipeline) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, decoder_dtype="bfloat16")
    autoencoder = pipe.model.tokenizer.autoencoder
    assert {p.dtype for p in autoencoder.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in autoencoder.encoder.parameters()} == {torch.float32}
    latents = [draw(p, output_type="latent").images for p in (pipe, toy_pipe)]
    assert torch.equal(*latents)
    own, exact = (stack_uint8(draw(p).images).astype(float) for p in (pipe, toy_pipe))
    assert 0 < np.abs(own - exact).mean() < 3
    assert draw(pipe).config["decoder_dtype"] == "bfloat16"
    assert draw(toy_pipe).config["decoder_dtype"] is None


def test_decoder_may_be_more_exact_than_the_rest(toy_folder: Path, toy_pipe: Pipeline) -> None:
    """Its weights then come from the file, not from the coarser dtype."""
    pipe = Pipeline.from_pretrained(toy_folder, dtype="bfloat16", decoder_dtype=torch.float32)
    own, exact = (p.model.tokenizer.autoencoder for p in (pipe, toy_pipe))
    assert all(torch.equal(p, exact.decoder.get_parameter(name)) for name, p in own.decoder.named_parameters())
    assert own.encoder.conv_in.weight.dtype == torch.bfloat16


def convolutions(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_convolutions_are_channels_last(weights: str, toy_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, weights=weights)
    found = convolutions(pipe.model.tokenizer.autoencoder)
    assert len(found) > 20
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in found)


SMALL = {
    "infinity": ModelSpec(
        name="small",
        family="infinity",
        transformer=InfinityConfig(depth=2, width=64, heads=2, bits=8, text_width=24, pool_heads=2, text_tokens=16),
        autoencoder=AutoencoderConfig(
            latent_channels=8, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1
        ),
        conditioner="t5-xl",
        defaults=Defaults(),
    ),
    "var": ModelSpec(
        name="small",
        family="var",
        transformer=VARConfig(depth=2, width=64, heads=2, codebook_size=48, latent_channels=8),
        autoencoder=replace(VQ_F16, latent_channels=8, base_channels=32, num_res_blocks=1, codebook_size=48),
        conditioner="imagenet",
        budgets=("0.06M",),
        ratios=("1:1",),
        grids=VARConfig(depth=2, width=64, heads=2).grids,
    ),
    "switti": ModelSpec(
        name="small",
        family="switti",
        transformer=SwittiConfig(depth=2, width=64, heads=2, codebook_size=48, latent_channels=8, num_levels=10),
        autoencoder=replace(VQ_F16, latent_channels=8, base_channels=32, num_res_blocks=1, codebook_size=48),
        conditioner="clip-pair",
        budgets=("0.06M",),
        ratios=("1:1",),
        grids=VARConfig(depth=2, width=64, heads=2).grids,
    ),
}
"""A model of every family, small enough to be filled with noise in no time."""


@pytest.fixture(params=[name if name == "var" else pytest.param(name, marks=pytest.mark.soak) for name in SMALL])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Takes the place of a published model, so that its name loads it."""
    spec = SMALL[request.param]
    monkeypatch.setitem(PUBLISHED, "infinity-125m", replace(PUBLISHED["infinity-125m"], spec=spec))
    return spec


def test_codebook_and_latent_do_not_follow_the_decoder(small: ModelSpec) -> None:
    plain = Pipeline.from_pretrained("infinity-125m", weights="random")
    mixed = Pipeline.from_pretrained("infinity-125m", weights="random", decoder_dtype="bfloat16")
    prompt = "207" if small.family == "var" else "a cat"
    latents = [p(prompt, seed=1, output_type="latent").images for p in (plain, mixed)]
    assert torch.equal(*latents)
    pixels = [p.model.tokenizer.decode(latents[0]) for p in (plain, mixed)]
    assert 0 < float((pixels[0] - pixels[1]).abs().mean()) < 0.05
    assert pixels[1].dtype == torch.float32


# Weights in int8 and fp8


@pytest.mark.in_turn("kind", "dtype")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_by_the_memory_model_are_the_loaded_ones(small: ModelSpec, kind: str, dtype: torch.dtype) -> None:
    plain = Pipeline.from_pretrained("infinity-125m", weights="random", dtype=dtype).model
    model = Pipeline.from_pretrained("infinity-125m", weights="random", dtype=dtype, quantization=kind).model
    buffers = sum(b.nbytes for b in model.transformer.buffers())
    assert weights_bytes(model)["transformer"] - buffers == transformer_bytes(small, dtype, kind)
    assert weights_bytes(plain)["transformer"] - buffers == transformer_bytes(small, dtype)
    assert weights_bytes(model)["tokenizer"] == weights_bytes(plain)["tokenizer"]
    need = memory_need(small, dtype, Full(), quantization=kind)
    assert need.transformer == transformer_bytes(small, dtype, kind) < memory_need(small, dtype, Full()).transformer
    assert model.transformer.compute_dtype == model.dtype == dtype


def test_a_picture_of_eight_bits_is_near_and_drawn_again(
    int8_pipe: Pipeline, toy_pipe: Pipeline, tmp_path: Path
) -> None:
    output = draw(int8_pipe)
    assert not np.array_equal(stack_uint8(output.images), stack_uint8(draw(toy_pipe).images))
    assert output.config["quantization"] == "int8"
    assert output.config["versions"]["torchao"]
    path = save_image(output.images[0], tmp_path / "a.png", output.row_config(0))  # type: ignore[arg-type]
    again = regenerate(path, int8_pipe)
    assert again.is_identical
    assert again.differences == ()
    without = regenerate(path, toy_pipe)
    assert not without.is_identical
    assert "quantization: int8 then, None now" in without.differences


@pytest.mark.soak
def test_a_registered_model_is_loaded_as_it_was(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained("emoji-tiny", quantization="fp8", decoder_dtype="bfloat16")
    output = pipe("hamburger", seed=1, policy="skip-scales:count=2")
    path = save_image(output.images[0], tmp_path / "a.png", output.row_config(0))  # type: ignore[arg-type]
    again = regenerate(path)
    assert again.is_identical
    assert again.differences == ()


def test_refusals() -> None:
    with pytest.raises(FoveateError, match="no quantization 'int4'"):
        Pipeline.from_pretrained("emoji-tiny", quantization="int4")
    with pytest.raises(FoveateError, match="decoder_dtype must be one of float32, bfloat16, float16, got int8"):
        Pipeline.from_pretrained("emoji-tiny", decoder_dtype="int8")
    assert Precision(dtype=torch.bfloat16, decoder_dtype=torch.float16).autoencoder_dtype == torch.float32


# Runs alone in a process whose allocator gives everything back at once.
MEASURE = """
import json, sys, torch
from foveate.bench.memory import ResidentMeter, weights_bytes
from foveate.weights.quantization import quantize_blocks
from foveate.pipeline.pipeline import Pipeline

quantize_blocks([torch.nn.Linear(64, 64).requires_grad_(False)], "int8")
torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(64, 64)
meter, found = ResidentMeter(), []
meter.start()
pipe = Pipeline.from_pretrained("infinity-125m", weights="random", quantization=sys.argv[1])
peak = meter.added_bytes()
meter.start()
print(json.dumps([peak, sum(weights_bytes(pipe.model).values())]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of peak memory")
@pytest.mark.soak
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_loading_peaks_at_the_unquantised_weights(kind: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, kind], env=environment, capture_output=True, text=True, check=True
    )
    peak, held = json.loads(done.stdout)
    need = memory_need(PUBLISHED["infinity-125m"].spec, torch.float32, Full())
    assert held < 0.7 * (need.transformer + need.autoencoder)
    assert peak < 1.1 * (need.transformer + need.autoencoder)
    assert [line for line in done.stderr.splitlines() if not line.startswith("the C kernels do not run here")] == []
