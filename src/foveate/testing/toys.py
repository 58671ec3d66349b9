"""Tiny real models with large random weights, and requests for them.

Axes: T text tokens, E text width.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.conditions import Condition, PlacedText
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.families.hart import ResidualRefiner
from foveate.models.hart import HART, HARTConfig
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.tokenizers.vq import VQTokenizer

TEXT_WIDTH = 32
LATENT_CHANNELS = 8

TINY_GRIDS: dict[str, tuple[tuple[Grid, ...], int]] = {
    "square": (((1, 1), (2, 2), (4, 4), (6, 6), (8, 8)), 1),
    "wide": (((1, 1), (1, 2), (2, 4), (3, 6), (5, 10)), 1),
    "odd": (((1, 1), (3, 2), (5, 3), (7, 5), (9, 7)), 1),
    "patches": (((1, 1), (2, 2), (3, 3), (4, 5), (5, 6)), 2),
}
"""Token grids, and latents along a side of a token, of every tiny model of bits."""

TINY_MODELS = (*TINY_GRIDS, "text")
"""Every tiny model: those of bits, and one of codes with a text in front of its scales and a refined last one."""

TEXT_TOKENS, CODEBOOK_SIZE = 9, 48
"""Of the model with a text in front."""


def randomise(module: nn.Module, seed: int) -> None:
    """Fills every parameter with noise, biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.data.normal_(generator=generator)
        if name.endswith("scale_mul_1H11"):
            parameter.data.mul_(0.2).add_(math.log(4.0))
        elif name.endswith("weight") and "norm" in name.split(".")[-2]:
            parameter.data.mul_(0.2).add_(1.0)
        elif parameter.dim() == 1:
            parameter.data.mul_(0.2)
        else:
            parameter.data.mul_((parameter.numel() // parameter.shape[0]) ** -0.5)


def tiny_model(patch: int = 1, dtype: torch.dtype = torch.float32) -> Infinity:
    """A transformer of five blocks, 64 wide."""
    config = InfinityConfig(
        depth=5,
        width=64,
        heads=4,
        bits=LATENT_CHANNELS * patch**2,
        text_width=TEXT_WIDTH,
        pool_heads=2,
        text_tokens=16,
    )
    model = Infinity(config)
    randomise(model, seed=5)
    return model.requires_grad_(requires_grad=False).to(dtype).eval()


def tiny_tokenizer(patch: int = 1) -> BSQTokenizer:
    """Bits of eight channels."""
    config = AutoencoderConfig(
        latent_channels=LATENT_CHANNELS, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, patch=4
    )
    autoencoder = Autoencoder(config)
    randomise(autoencoder, seed=9)
    return BSQTokenizer(autoencoder.requires_grad_(requires_grad=False).eval(), patch)


def tiny_text_model(dtype: torch.dtype = torch.float32) -> HART:
    """A transformer of five blocks, 64 wide, that reads its text in front of the scales."""
    config = HARTConfig(
        depth=5,
        width=64,
        heads=4,
        codebook_size=CODEBOOK_SIZE,
        latent_channels=LATENT_CHANNELS,
        text_width=TEXT_WIDTH,
        text_tokens=TEXT_TOKENS,
        ff_width=128,
        diff_width=32,
        diff_depth=2,
    )
    model = HART(config)
    randomise(model, seed=7)
    # At a quarter of the usual scale, scores need louder queries and keys to tell tokens apart.
    for index in range(config.depth):
        model.block(index).attn.qkv_proj.weight.data.mul_(2.5)
    return model.requires_grad_(requires_grad=False).to(dtype).eval()


def tiny_codes() -> VQTokenizer:
    """Codes of eight channels; the last scale is added as it is."""
    config = AutoencoderConfig(
        latent_channels=LATENT_CHANNELS,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=CODEBOOK_SIZE,
    )
    autoencoder = Autoencoder(config)
    randomise(autoencoder, seed=8)
    return VQTokenizer(autoencoder.requires_grad_(requires_grad=False).eval(), refines_last=False)


def tiny_engine(name: str = "square", dtype: torch.dtype = torch.float32) -> tuple[Engine, ScaleSchedule]:
    """A tiny model by its name, as an engine, and its schedule."""
    if name == "text":
        model, codes = tiny_text_model(dtype), tiny_codes()
        refiner = ResidualRefiner(transformer=model, tokenizer=codes)
        return Engine(model, codes, refiner=refiner), ScaleSchedule.from_grids(TINY_GRIDS["square"][0])
    grids, patch = TINY_GRIDS[name]
    return Engine(tiny_model(patch, dtype), tiny_tokenizer(patch)), ScaleSchedule.from_grids(grids, patch=patch)


def text_features(seed: int, length: int) -> Float[Tensor, "T E"]:
    """Random features of a prompt."""
    return torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(100 + seed))


def placed_text(seed: int, length: int) -> PlacedText:
    """Random features of a prompt, padding behind it included."""
    positions = tuple(min(i, length - 1) for i in range(TEXT_TOKENS))
    return PlacedText(tokens_TE=text_features(seed, TEXT_TOKENS), positions=positions)


def tiny_request(
    schedule: ScaleSchedule, seeds: Sequence[int] = (3,), weight: float = 2.5, *, name: str = "square"
) -> Request:
    """Guided images of a tiny model, each with a seed and a prompt of its own."""
    count = len(schedule)
    conditions: list[Condition] = [text_features(seed, 4 + seed % 5) for seed in seeds]
    if name == "text":
        nothing = PlacedText.nothing(TEXT_TOKENS, TEXT_WIDTH, torch.device("cpu"))
        conditions = [*(placed_text(seed, 4 + seed % 5) for seed in seeds), *[nothing] * len(seeds)]
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(weight,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=tuple(seeds)),
        conditions=tuple(conditions),
        num_images=len(seeds),
    )
