"""A family in one file, as a stranger would add it: images of classes that are counted in words.

Network, key map, record and adapter stand below each other; in the library each would be a file of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.adapters.adapter import METHOD, Adapter
from foveate.core.conditions import ClassLabel
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import Grid
from foveate.families.family import Conditioning, Family, Network, TextEncoderFiles
from foveate.families.spec import Defaults, ModelSpec, Published, WeightSource, budget_of
from foveate.families.vq import VQ, codes, vq_tokenizer
from foveate.models.var import VAR, VARConfig
from foveate.tokenizers.autoencoder import AutoencoderConfig
from foveate.weights.key_map import WeightKind, axes_of, copy_weights, count_of, declare, refuse_foreign
from foveate.weights.names import plain_names
from foveate.weights.stored import State

GRIDS: tuple[Grid, ...] = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16))
NUM_WORDS = 9

# The network: `models/dots.py`.


@dataclass(frozen=True, kw_only=True, slots=True)
class DotsConfig:
    """Shape of a transformer; the rest is fixed."""

    depth: int
    width: int
    codebook_size: int
    latent_channels: int


class Dots(VAR):
    """The blocks of VAR over an embedding of another name."""

    def __init__(self, config: DotsConfig) -> None:
        super().__init__(
            VARConfig(
                depth=config.depth, width=config.width, heads=2, num_classes=NUM_WORDS, grids=GRIDS,
                codebook_size=config.codebook_size, latent_channels=config.latent_channels,
            )
        )  # fmt: skip
        self.dots = self._modules.pop("class_emb")

    @property
    def class_emb(self) -> nn.Module:
        return self.dots


# The key map: `weights/dots.py`.

declare(WeightKind(name="Dots", role="a transformer of dots", marks=("dots.weight",)))


def dots_state(state: State) -> State:
    """The weights under their own names."""
    state = plain_names(state, "Dots")
    refuse_foreign(state, "Dots")
    return state


def infer_dots_config(state: State, _facts: Mapping[str, Any]) -> DotsConfig:
    """The shape."""
    state = dots_state(state)
    codebook_size, width = axes_of(state, "head.weight", 2)
    return DotsConfig(
        depth=count_of(state, r"blocks\.(\d+)\."),
        width=width,
        codebook_size=codebook_size,
        latent_channels=axes_of(state, "word_embed.weight", 2)[1],
    )


def load_dots(model: Dots, state: State) -> None:
    """Fills a transformer."""
    copy_weights(model, dots_state(state), "transformer")


# The record: `families/dots.py`.


@dataclass(frozen=True)
class CountedWords:
    """A prompt is the number of its words."""

    def encode(self, prompts: list[str]) -> list[ClassLabel]:
        return [ClassLabel(index=min(len(prompt.split()), NUM_WORDS - 1)) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        return max(len(prompt.split()) - NUM_WORDS + 1, 0)


def _read(_files: TextEncoderFiles) -> CountedWords:
    return CountedWords()


def _stand_in(_config: DotsConfig, _device: torch.device) -> CountedWords:
    return CountedWords()


def _guidance(cfg: tuple[float, ...], _window: tuple[int, int | None]) -> GuidanceSchedule:
    return GuidanceSchedule(weights=tuple(2 * weight for weight in cfg))


def _sizes(_transformer: DotsConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    return {"grids": GRIDS, "budgets": (budget_of(GRIDS, autoencoder.stride),)}


def _shape(config: DotsConfig) -> DotsConfig:
    return config


AUTOENCODER = AutoencoderConfig(
    latent_channels=8, base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1, codebook_size=64
)


def _published() -> tuple[Published, ...]:
    spec = ModelSpec(
        name="dots-d2",
        family="dots",
        transformer=DotsConfig(depth=2, width=64, codebook_size=64, latent_channels=8),
        autoencoder=AUTOENCODER,
        conditioner="words",
        budgets=("0.06M",),
        ratios=("1:1",),
        grids=GRIDS,
        defaults=Defaults(guidance_scale=1.5, temperature=1.0),
    )
    files = (WeightSource(repo="someone/dots", path=name) for name in ("dots_d2.pth", "spots.pth"))
    return (Published(spec=spec, transformer=next(files), autoencoder=next(files), text_encoders=(), licence="MIT"),)


FAMILY = Family(
    name="dots",
    transformer=Network(
        kind="Dots", config=DotsConfig, build=Dots, load=load_dots, infer=infer_dots_config, plain=dots_state
    ),
    autoencoder=VQ,
    tokenizer=vq_tokenizer,
    symbols=codes,
    guidance=_guidance,
    conditionings=(Conditioning(name="words", parameters=7, read=_read),),
    random_conditioner=_stand_in,
    sizes=_sizes,
    published=_published,
    shape=_shape,
    has_negatives=False,
    adapter="tests.toy_family:OfficialDots",
)

# The adapter: `adapters/dots.py`.


class OfficialDots(Adapter):
    """An object whose own code has the method and nothing else."""

    reads = ("B",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def engine(self, arguments: Mapping[str, Any]) -> Any:
        raise NotImplementedError(METHOD)

    def request(self, arguments: Mapping[str, Any], engine: Any) -> Any:
        raise NotImplementedError(METHOD)

    def answer(self, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        return pixels_B3YX
