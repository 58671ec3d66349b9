"""Decoding in strips against the plain decoders: the same pixels whatever the strips, in less memory."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.tokenizers import strips
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.tokenizers.strips import MapNorm, convolve, enlarge, one_late, strips_of
from foveate.tokenizers.vq import VQTokenizer
from tests.randomness import normal
from tests.toys import randomise

KINDS = ("bits", "bits of patches", "ids")


def random_map(seed: int, *shape: int) -> Tensor:
    return normal(*shape, stream=seed)


def make_tokenizer(kind: str) -> BSQTokenizer | VQTokenizer:
    """Widths grow, so that blocks with and without a shortcut run at every kind of place."""
    if kind == "ids":
        autoencoder: nn.Module = Autoencoder(
            AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2, 2), codebook_size=16)
        )
    else:
        patch = 2 if kind == "bits of patches" else 1
        autoencoder = Autoencoder(
            AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2, 2), patch=patch)
        )
    randomise(autoencoder, seed=4)
    autoencoder = autoencoder.requires_grad_(requires_grad=False).eval()
    return VQTokenizer(autoencoder) if kind == "ids" else BSQTokenizer(autoencoder)


def off(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the standard deviation."""
    return float((found.double() - exact).abs().max() / exact.std())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [1, 64 * 7 * 3, 2**20])
def test_strips_give_what_the_plain_decoder_gives(kind: str, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a strip, a number that divides nothing, and everything at once; an odd size, fresh latents."""
    monkeypatch.setattr(strips, "CPU_VALUES", values)
    tokenizer = make_tokenizer(kind)
    for seed, grid in enumerate([(5, 7), (1, 3), (6, 4)]):
        latent = random_map(100 * values + seed, 1, 8, *grid)
        exact = copy.deepcopy(tokenizer.autoencoder).double().decode(latent.double())
        plain, found = tokenizer.autoencoder.decode(latent), tokenizer.autoencoder.decode_in_strips(latent)
        assert found.shape == exact.shape
        assert off(found, exact) < max(3 * off(plain, exact), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_decoded_image_by_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "CPU_VALUES", 5000)
    tokenizer, latent = make_tokenizer(kind), random_map(1, 3, 8, 5, 3)
    found = tokenizer.decode(latent)
    assert torch.allclose(found, tokenizer.autoencoder.decode(latent).clamp(-1, 1), atol=1e-4)
    assert all(torch.equal(tokenizer.decode(latent[i : i + 1])[0], found[i]) for i in range(3))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_far_off_as_the_plain_decoder(kind: str, dtype: torch.dtype) -> None:
    tokenizer, latent = make_tokenizer(kind), random_map(2, 1, 8, 5, 7)
    exact = copy.deepcopy(tokenizer.autoencoder).double().decode(latent.double())
    half = tokenizer.autoencoder.to(dtype)
    plain, found = half.decode(latent.to(dtype)), half.decode_in_strips(latent.to(dtype))
    assert found.dtype == dtype
    assert off(found, exact) < 1.5 * off(plain, exact)


@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([32, 64]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_doubling_and_convolution_are_one(height: int, width: int, channels: int, seed: int) -> None:
    conv = nn.Conv2d(channels, 32, 3, padding=1)
    randomise(nn.ModuleDict({"conv": conv}), seed)
    x = random_map(seed, 1, channels, height, width)
    plain = conv.double()(F.interpolate(x.double(), scale_factor=2.0, mode="nearest"))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(strips, "CPU_VALUES", 1 + 40 * seed)
        assert off(enlarge(x, conv.float()), plain) < 3e-6


@pytest.mark.parametrize("center", [0.0, 3.0, 1e4])
def test_norm_takes_its_statistics_over_the_whole_map(center: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from zero, and drifting from row to row, so that a strip's own statistics would be plainly wrong."""
    monkeypatch.setattr(strips, "CPU_VALUES", 64 * 5 * 3)
    layer = nn.GroupNorm(32, 64, eps=1e-6)
    randomise(nn.ModuleDict({"norm": layer}), seed=2)
    x = random_map(3, 1, 64, 11, 5) * torch.linspace(0.1, 5, 11)[:, None] + center
    norm = MapNorm.of(layer, x)
    groups = x.double().view(32, -1)
    assert torch.allclose(norm.mean_c.view(32, 2).double(), groups.mean(1, keepdim=True).expand(-1, 2), rtol=1e-6)
    variance = groups.var(1, correction=0, keepdim=True)
    assert torch.allclose(norm.variance_c.view(32, 2).double(), variance.expand(-1, 2), rtol=1e-5)
    exact = F.silu(copy.deepcopy(layer).double()(x.double()))
    with torch.inference_mode():
        assert off(norm.activate(x), exact) < (1e-3 if center > 100 else 1e-5)


def test_a_map_without_contrast_is_its_norms_bias() -> None:
    layer, conv = nn.GroupNorm(32, 32, eps=1e-6), nn.Conv2d(32, 4, 3, padding=1)
    randomise(nn.ModuleDict({"norm": layer, "conv": conv}), seed=5)
    flat = torch.full((1, 32, 4, 4), 7.0)
    with torch.inference_mode():
        found = convolve(flat, layer, conv)
        assert torch.allclose(found, conv(F.silu(layer.bias[:, None, None].expand_as(flat))), atol=1e-3)


@given(height=st.integers(1, 40), width=st.integers(1, 40), channels=st.integers(1, 64), values=st.integers(1, 5000))
def test_strips_tile_a_map(height: int, width: int, channels: int, values: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "CPU_VALUES", values)
        found = strips_of(torch.empty(1, channels, height, width))
    assert [row for top, end in found for row in range(top, end)] == list(range(height))
    assert all((end - top) * width * channels <= max(values, width * channels) for top, end in found)


def test_one_late_runs_one_ahead() -> None:
    computed: list[int] = []
    parts = one_late(computed.append(i) or i for i in range(3))
    assert [(next(parts), list(computed)) for _ in range(3)] == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]


# Runs alone in a process whose allocator gives everything back at once.
MEASURE = """
import json, sys
import torch
from foveate.bench.memory import ResidentMeter
from foveate.weights.random_weights import fill_randomly
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig

config = AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1)
model = Autoencoder(config)
fill_randomly(model)
meter, latent, found = ResidentMeter(), torch.randn(1, 8, 192, 256), []
with torch.inference_mode():
    for decode in (model.decode, model.decode_in_strips):
        decode(latent[:, :, :32, :32])
        meter.start()
        decode(latent)
        found.append(meter.added_bytes())
print(json.dumps(found))
"""


@pytest.mark.soak
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of peak memory")
def test_two_maps_are_alive_at_most() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    plain, found = json.loads(done.stdout)
    # The largest map is what is enlarged last, 64 channels at full size; its block's output has 32.
    largest = 64 * 384 * 512 * 4
    assert found < 2.2 * largest
    assert plain > 1.5 * found
