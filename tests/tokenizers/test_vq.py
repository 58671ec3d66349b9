"""Vector quantisation: which convolution refines a scale, ids and soft symbols, the encoder's side, the autoencoder."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from foveate.engine.sample import ForcedSampler
from foveate.policies.registry import load_policy
from foveate.tokenizers.autoencoder import VQ_F16, Attention, Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer, refiner_index
from tests.randomness import normal
from tests.toys import LATENT_CHANNELS, VAR_GRIDS, label_request, randomise, run, toy_var, with_sampler


def tokenizer() -> VQTokenizer:
    return toy_var().tokenizer


def random_map(seed: int, *shape: int) -> Tensor:
    return normal(*shape, stream=seed)


# Which convolution


@pytest.mark.parametrize("num_scales", [10, 14])
def test_tables_hold_a_nearest_tick(num_scales: int):
    """In exact arithmetic the ten scales have two ties, the fourteen none; a tie is what the table is for."""
    ticks = [Fraction(1, 12) + Fraction(10, 36) * i for i in range(4)]
    ties = 0
    for scale in range(num_scales):
        distances = [abs(tick - Fraction(scale, num_scales - 1)) for tick in ticks]
        nearest = [i for i in range(4) if distances[i] == min(distances)]
        assert refiner_index(scale, num_scales, 4) in nearest
        ties += len(nearest) > 1
    assert ties == {10: 2, 14: 0}[num_scales]


@pytest.mark.parametrize("num_scales", [10, 14])
def test_tables_are_what_float64_rounds_to(num_scales: int):
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    found = [int(np.argmin(np.abs(ticks - scale / (num_scales - 1)))) for scale in range(num_scales)]
    assert [refiner_index(scale, num_scales, 4) for scale in range(num_scales)] == found


def test_other_schedules_take_the_nearest_tick():
    assert [refiner_index(scale, 6, 4) for scale in range(6)] == [0, 0, 1, 2, 3, 3]
    assert [refiner_index(scale, 3, 3) for scale in range(3)] == [0, 1, 2]
    assert [refiner_index(scale, 5, 2) for scale in range(5)] == [0, 0, 0, 1, 1]
    assert refiner_index(0, 1, 4) == 0
    assert {refiner_index(scale, 7, 1) for scale in range(7)} == {0}


# Ids and soft symbols


def test_residual_looks_codes_up_in_reading_order():
    codebook = tokenizer().autoencoder.quantize.embedding.weight
    ids = torch.tensor([[[3], [0], [47], [3], [9], [1]]])
    residual = tokenizer().residual(ids, (2, 3))
    assert residual.shape == (1, LATENT_CHANNELS, 2, 3)
    for place, index in enumerate(ids.flatten().tolist()):
        assert torch.equal(residual[0, :, place // 3, place % 3], codebook[index])


def test_soft_symbols_mix_codes():
    ids = torch.randint(48, (2, 12, 1), generator=torch.Generator().manual_seed(1))
    hard = tokenizer().residual(ids, (3, 4))
    assert torch.allclose(tokenizer().residual(F.one_hot(ids[..., 0], 48).float(), (3, 4)), hard, atol=1e-6)
    other = tokenizer().residual(ids.flip(1), (3, 4))
    mixed = 0.25 * F.one_hot(ids[..., 0], 48).float() + 0.75 * F.one_hot(ids.flip(1)[..., 0], 48).float()
    assert torch.allclose(tokenizer().residual(mixed, (3, 4)), 0.25 * hard + 0.75 * other, atol=1e-6)


def test_symbols_are_one_distribution_per_token():
    logits = random_map(1, 5, 48)
    assert torch.equal(tokenizer().symbols(logits), logits[:, None])


@pytest.mark.parametrize("scale", range(5))
def test_add_enlarges_refines_and_leaves_its_input(scale: int):
    """0.5 h + 0.5 conv(h), the convolution written out as shifted products over zero padding."""
    grid = VAR_GRIDS[scale]
    residual, f_hat = random_map(scale, 2, LATENT_CHANNELS, *grid), random_map(9, 2, LATENT_CHANNELS, 6, 6)
    before = f_hat.clone()
    h = residual if scale == 4 else F.interpolate(residual, size=(6, 6), mode="bicubic")
    weight, bias = tokenizer().autoencoder.quantize.refiner(refiner_index(scale, 5, 4))
    padded, conv = F.pad(h, (1, 1, 1, 1)), bias[:, None, None].expand(2, -1, 6, 6)
    for dy in range(3):
        for dx in range(3):
            conv = conv + torch.einsum("oi,biyx->boyx", weight[:, :, dy, dx], padded[:, :, dy : dy + 6, dx : dx + 6])
    found = tokenizer().add(f_hat, residual, scale, 5)
    assert torch.allclose(found, f_hat + 0.5 * h + 0.5 * conv, atol=1e-5)
    assert torch.equal(f_hat, before)


def test_next_input_averages():
    f_hat = random_map(3, 1, LATENT_CHANNELS, 6, 6)
    assert torch.equal(tokenizer().next_input(f_hat, (6, 6)), f_hat)
    small = tokenizer().next_input(f_hat, (3, 2))
    assert torch.allclose(small, f_hat.unfold(2, 2, 2).unfold(3, 3, 3).mean((-1, -2)), atol=1e-6)


# The encoder's side


GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5).map(
    lambda grids: tuple(zip(*(sorted(axis) for axis in zip(*grids, strict=True)), strict=True))
)


@settings(max_examples=25)
@given(grids=GRIDS, seed=st.integers(0, 1000))
def test_forced_codes_reproduce_the_latent(grids: tuple[tuple[int, int], ...], seed: int):
    """What the quantiser says it made is what its ids add up to, bit for bit, on any schedule."""
    latent = random_map(seed, 2, LATENT_CHANNELS, *grids[-1])
    quantised = tokenizer().quantise(latent, grids)
    f_hat = torch.zeros_like(latent)
    for scale, (grid, ids) in enumerate(zip(grids, quantised.ids, strict=True)):
        assert ids.shape == (2, grid[0] * grid[1], 1)
        f_hat = tokenizer().add(f_hat, tokenizer().residual(ids, grid), scale, len(grids))
    assert torch.equal(f_hat, quantised.f_hat_BZHW)


def test_engine_reproduces_the_latent_from_forced_codes():
    toy = toy_var()
    quantised = tokenizer().quantise(random_map(4, 3, LATENT_CHANNELS, 6, 6), VAR_GRIDS)
    request = with_sampler(label_request(toy.schedule), ForcedSampler(symbols=quantised.ids))
    assert torch.equal(run(toy, load_policy("full"), request).f_hat, quantised.f_hat_BZHW)


def test_quantiser_takes_the_nearest_code_of_what_is_left():
    latent = random_map(5, 1, LATENT_CHANNELS, 6, 6)
    codebook = tokenizer().autoencoder.quantize.embedding.weight.double()
    quantised = tokenizer().quantise(latent, VAR_GRIDS)
    f_hat = torch.zeros_like(latent)
    for scale, grid in enumerate(VAR_GRIDS):
        left = F.adaptive_avg_pool2d((latent - f_hat).double(), grid)[0].flatten(1).T
        distances = [[float((place - code).square().sum()) for code in codebook] for place in left]
        assert quantised.ids[scale][0, :, 0].tolist() == [int(np.argmin(row)) for row in distances]
        f_hat = tokenizer().add(f_hat, tokenizer().residual(quantised.ids[scale], grid), scale, 5)


def test_plain_refinement_recovers_what_the_codebook_can_say():
    """Where refining changes nothing, a latent made of codes needs its last scale alone to come back exactly."""
    config = AutoencoderConfig(
        latent_channels=4,
        base_channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        codebook_size=16,
        num_refiners=1,
    )
    autoencoder = Autoencoder(config).requires_grad_(requires_grad=False)
    init_weights(autoencoder)
    weight, bias = autoencoder.quantize.refiner(0)
    weight.zero_()
    weight[range(4), range(4), 1, 1] = 1.0
    bias.zero_()
    ids = torch.randint(16, (2, 20, 1), generator=torch.Generator().manual_seed(2))
    plain = VQTokenizer(autoencoder)
    latent = plain.residual(ids, (4, 5))
    quantised = plain.quantise(latent, ((4, 5),))
    assert torch.equal(quantised.ids[0], ids)
    assert torch.equal(quantised.f_hat_BZHW, latent)


def test_latent_on_another_grid_is_refused():
    with pytest.raises(FoveateError, match=r"must be on the last grid \(6, 6\), got \(5, 6\)"):
        tokenizer().quantise(random_map(1, 1, LATENT_CHANNELS, 5, 6), VAR_GRIDS)


# The autoencoder


def test_attention_by_its_definition():
    layer = Attention(64)
    randomise(layer, seed=3)
    x = random_map(6, 2, 64, 3, 5)
    normed = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2)
    qkv = torch.einsum("oi,bip->bop", layer.qkv.weight[:, :, 0, 0], normed) + layer.qkv.bias[:, None]
    q, k, v = qkv.chunk(3, dim=1)
    weights = (torch.einsum("bcp,bcq->bpq", q, k) / 8).softmax(-1)
    mixed = torch.einsum("bpq,bcq->bcp", weights, v)
    out = torch.einsum("oi,bip->bop", layer.proj_out.weight[:, :, 0, 0], mixed) + layer.proj_out.bias[:, None]
    assert torch.allclose(layer(x), x + out.view_as(x), atol=1e-5)


def test_decoding_one_image_does_not_depend_on_its_mates():
    f_hat = random_map(7, 3, LATENT_CHANNELS, 6, 6)
    pixels = tokenizer().decode(f_hat)
    assert pixels.shape == (3, 3, 12, 12)
    assert tokenizer().stride == 2
    assert pixels.dtype == torch.float32
    assert float(pixels.abs().max()) <= 1.0
    assert all(torch.equal(tokenizer().decode(f_hat[i : i + 1])[0], pixels[i]) for i in range(3))
    assert not torch.equal(pixels[0], pixels[1])


def test_encoder_halves_per_level_and_attends_where_it_is_coarse():
    config = AutoencoderConfig(
        latent_channels=4, base_channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=2, codebook_size=8
    )
    autoencoder = Autoencoder(config).requires_grad_(requires_grad=False)
    assert autoencoder.encode(torch.zeros(1, 3, 16, 24)).shape == (1, 4, 4, 6)
    assert autoencoder.decode(torch.zeros(1, 4, 4, 6)).shape == (1, 3, 16, 24)
    assert [len(level.attn) for level in autoencoder.encoder.down] == [0, 0, 2]
    assert [len(level.attn) for level in autoencoder.decoder.up] == [0, 0, 3]
    with pytest.raises(FoveateError, match="must be divisible by 32, got 40"):
        replace(VQ_F16, base_channels=40)
