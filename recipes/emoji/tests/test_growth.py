"""A larger model that begins with a smaller one: what it draws at first, whose codes it has, which tokens run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from foveate.core.schedule import ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import AutoencoderConfig
from foveate.tokenizers.bsq import quantise
from recipes.emoji.crops import Crop
from recipes.emoji.growth import grown
from recipes.emoji.shared_codes import SharedCodes, fit_codes
from recipes.emoji.teacher import Teacher, pad_texts
from recipes.emoji.tokenizer import new_autoencoder, reconstruct
from recipes.emoji.transformer import small_start

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
SHAPE = InfinityConfig(depth=3, width=32, heads=2, bits=8, text_width=12, pool_heads=2, text_tokens=8, ff_width=64)


def _model(shape: InfinityConfig) -> Infinity:
    torch.manual_seed(3)
    model = Infinity(shape)
    init_weights(model)
    small_start(model)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def _logits(model: Infinity, latents: Tensor, crop: Crop | None = None) -> Tensor:
    quantised = quantise(latents, GRIDS)
    texts = pad_texts([torch.ones(5, 12), torch.ones(3, 12)], 7)
    teacher = Teacher(model=model, schedule=ScaleSchedule.from_grids(GRIDS), masked_tokens=6, dtype=torch.float32)
    inputs = quantised.inputs if crop is None else crop.of(quantised).inputs
    with torch.no_grad():
        return teacher.logits(texts, inputs, crop=crop)


def test_a_deeper_model_begins_with_the_logits_of_the_shallower_one() -> None:
    given, deep = _model(SHAPE), replace(SHAPE, depth=5)
    model, latents = Infinity(deep).eval(), torch.randn(2, 8, 4, 4)
    model.load_state_dict(grown(given.state_dict(), SHAPE, deep, scales=3))
    before, after = _logits(given, latents), _logits(model, latents)
    torch.testing.assert_close(after[:, :14], before[:, :14])
    assert torch.equal(model.lvl_embed.weight[3], given.lvl_embed.weight[2])
    moved = grown(given.state_dict(), SHAPE, deep, scales=3)
    assert any(bool(value.abs().sum() > 0) for name, value in moved.items() if "1.sa.mat_qkv" in name)
    with pytest.raises(FoveateError, match="in depth only"):
        grown(given.state_dict(), SHAPE, replace(SHAPE, depth=2), scales=3)


def test_a_cropped_scale_has_the_tokens_of_its_window() -> None:
    crop = Crop(whole=2, y=1.0, x=0.0)
    quantised = quantise(torch.randn(2, 8, 4, 4), GRIDS)
    cropped = crop.of(quantised)
    assert [tuple(bits.shape[1:3]) for bits in cropped.bits] == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert torch.equal(cropped.bits[3], quantised.bits[3][:, 2:, :2])
    assert torch.equal(cropped.inputs[2], quantised.inputs[2][:, :, 2:, :2])
    assert torch.equal(crop.of_tokens(3, (4, 4), torch.arange(16)[:, None])[:, 0], torch.tensor([8, 9, 12, 13]))
    assert {Crop.drawn(2, np.random.default_rng(n)).y for n in range(60)} == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_tokens_of_a_window_have_the_places_of_the_whole_scale() -> None:
    """The first cropped scale sees only what is before it and in its window: with one token in it, that is exact."""
    model, latents = _model(SHAPE), torch.randn(2, 8, 4, 4)
    grids = ((1, 1), (2, 2))
    quantised, texts = quantise(latents, grids), pad_texts([torch.ones(5, 12), torch.ones(3, 12)], 7)
    schedule = ScaleSchedule.from_grids(grids, finest=(4, 4))
    teacher = Teacher(model=model, schedule=schedule, masked_tokens=0, dtype=torch.float32)
    for y, x, token in ((0.0, 0.0, 0), (1.0, 0.0, 2), (1.0, 1.0, 3)):
        crop = Crop(whole=1, y=y, x=x)
        layout, whole = teacher._layout(2, crop), teacher._layout(2, None)
        assert torch.equal(layout.rotation_LD[1], whole.rotation_LD[1 + token])
        with torch.no_grad():
            assert teacher.logits(texts, crop.of(quantised).inputs, crop=crop).shape[1] == 2


def test_a_finer_tokenizer_takes_over_codes() -> None:
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(24, 3, 8, 8) * 2 - 1, (32, 32), mode="bilinear")
    older = new_autoencoder(AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1, 1), patch=4))
    model = new_autoencoder(AutoencoderConfig(latent_channels=8, base_channels=32, channel_multipliers=(1,), patch=4))
    grids, codes = (*GRIDS, (8, 8)), SharedCodes(autoencoder=older.eval(), grid=(4, 4))
    before = codes.distance(model.encode(pixels), pixels)
    rebuilt = reconstruct(model, pixels, grids)
    fit_codes(model, codes, pixels, grids)
    after = codes.distance(model.encode(pixels), pixels)
    assert after < 0.5 * before, (before, after)
    of_older, of_model = (quantise(one.encode(pixels), GRIDS[:2]).bits[1] for one in (older, model))
    assert (of_older == of_model).float().mean() > 0.8
    assert (reconstruct(model, pixels, grids) - rebuilt).square().mean() < rebuilt.var()
