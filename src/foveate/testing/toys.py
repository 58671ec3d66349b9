"""Tiny real models with large random weights, and requests for them.

Axes: T text tokens, E text width.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer

TEXT_WIDTH = 32
LATENT_CHANNELS = 8

TINY_GRIDS: dict[str, tuple[tuple[Grid, ...], int]] = {
    "square": (((1, 1), (2, 2), (4, 4), (6, 6), (8, 8)), 1),
    "wide": (((1, 1), (1, 2), (2, 4), (3, 6), (5, 10)), 1),
    "odd": (((1, 1), (3, 2), (5, 3), (7, 5), (9, 7)), 1),
    "patches": (((1, 1), (2, 2), (3, 3), (4, 5), (5, 6)), 2),
}
"""Token grids, and latents along a side of a token, of every tiny model."""


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


def tiny_engine(name: str = "square", dtype: torch.dtype = torch.float32) -> tuple[Engine, ScaleSchedule]:
    """A tiny model by the name of its grids, as an engine, and its schedule."""
    grids, patch = TINY_GRIDS[name]
    return Engine(tiny_model(patch, dtype), tiny_tokenizer(patch)), ScaleSchedule.from_grids(grids, patch=patch)


def text_features(seed: int, length: int) -> Float[Tensor, "T E"]:
    """Random features of a prompt."""
    return torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(100 + seed))


def tiny_request(schedule: ScaleSchedule, seeds: Sequence[int] = (3,), weight: float = 2.5) -> Request:
    """Guided images, each with a seed and a prompt of its own."""
    count = len(schedule)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(weight,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=tuple(seeds)),
        conditions=tuple(text_features(seed, 4 + seed % 5) for seed in seeds),
        num_images=len(seeds),
    )
