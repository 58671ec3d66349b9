"""The Infinity family (arXiv 2412.04431): bits, T5 or MiniLM text, all published aspect ratios.

Source of the published entries: model cards and inference scripts of Infinity (MIT).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from foveate.conditioning.t5 import FLAN_T5_XL, T5Text
from foveate.conditioning.text import Conditioner, RandomText
from foveate.core.guidance import GuidanceSchedule
from foveate.families.family import Conditioning, Family, Network, TextEncoderFiles, TextShape
from foveate.families.minilm import OWN
from foveate.families.spec import ALL_RATIOS, Defaults, ModelSpec, Published, WeightSource
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.weights.infinity import (
    autoencoder_state,
    infer_autoencoder_config,
    infer_infinity_config,
    load_autoencoder,
    load_transformer,
    transformer_tensors,
)
from foveate.weights.stored import State


def _infer(state: State, _facts: Mapping[str, Any]) -> InfinityConfig:
    return infer_infinity_config(state)


def _infer_autoencoder(state: State, _facts: Mapping[str, Any]) -> AutoencoderConfig:
    return infer_autoencoder_config(state)


def _plain(state: State) -> State:
    return transformer_tensors(state, infer_infinity_config(state))


def _bits(transformer: InfinityConfig, autoencoder: AutoencoderConfig, patch: int) -> tuple[str, str]:
    return f"{transformer.bits} bits a token", f"{autoencoder.latent_channels * patch**2} bits a token"


def _guidance(cfg: tuple[float, ...], _window: tuple[int, int | None]) -> GuidanceSchedule:
    return GuidanceSchedule.from_infinity(cfg, len(cfg))


def _read_t5(files: TextEncoderFiles) -> Conditioner:
    text = T5Text.from_pretrained(
        files.places[0], dtype=files.dtype, device=files.device, local_files_only=files.local_files_only
    )
    return replace(text, max_tokens=min(text.max_tokens, files.config.text_tokens))


def _random_text(config: InfinityConfig, device: torch.device) -> Conditioner:
    return RandomText(width=config.text_width, max_tokens=config.text_tokens, device=device)


def _text(config: InfinityConfig) -> TextShape:
    return TextShape(tokens=config.text_tokens, width=config.text_width)


def _sizes(transformer: InfinityConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    patch = round((transformer.bits / autoencoder.latent_channels) ** 0.5)
    return {"patch": patch, "budgets": ("1M",), "ratios": ALL_RATIOS}


def _shape(config: InfinityConfig) -> InfinityConfig:
    """How blocks are grouped leaves no trace; defaults are written out."""
    return replace(config, ff_width=config.hidden, chunks=1)


_T5_XL = Conditioning(
    name="t5-xl",
    parameters=1_223_527_424,
    # The second matrix of every feed-forward.
    float32_parameters=24 * 5120 * 2048,
    read=_read_t5,
)

_F16, _F8 = (1, 2, 4, 4, 4), (1, 2, 4, 4)
_D32 = {"depth": 32, "width": 2048, "heads": 16, "chunks": 8}
_D40 = {"depth": 40, "width": 3584, "heads": 28, "chunks": 8}
_PATCHIFY = "infinity_vae_d56_f8_14_patchify.pth"


def _entry(
    name: str,
    files: tuple[str, str],
    latent: int,
    multipliers: tuple[int, ...],
    budget: str,
    shape: dict[str, Any],
    temperature: float = 0.5,
    guidance_scale: float = 4.0,
) -> Published:
    """A published model; a token of the f8 autoencoder holds 2x2 latents."""
    patch = 2 if multipliers == _F8 else 1
    return Published(
        spec=ModelSpec(
            name=name,
            family=FAMILY.name,
            transformer=InfinityConfig(**shape, bits=latent * patch**2, text_width=2048, pool_heads=16),
            autoencoder=AutoencoderConfig(latent_channels=latent, base_channels=128, channel_multipliers=multipliers),
            patch=patch,
            conditioner=_T5_XL.name,
            budgets=(budget,),
            defaults=Defaults(guidance_scale=guidance_scale, temperature=temperature, top_k=900, top_p=0.97),
        ),
        transformer=WeightSource(repo="FoundationVision/Infinity", path=files[0]),
        autoencoder=WeightSource(repo="FoundationVision/Infinity", path=files[1]),
        text_encoders=(FLAN_T5_XL,),
        licence="MIT",
    )


def _published() -> tuple[Published, ...]:
    return (
        _entry(
            "infinity-125m",
            ("infinity_125M_256x256.pth", "infinity_vae_d16.pth"),
            16, _F16, "0.06M",
            {"depth": 12, "width": 768, "heads": 8, "chunks": 4},
        ),
        _entry("infinity-2b", ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth"), 32, _F16, "1M", _D32),
        _entry("infinity-8b", ("infinity_8b_weights", _PATCHIFY), 14, _F8, "1M", _D40, 1.0, 3.0),
        _entry("infinity-8b-512", ("infinity_8b_512x512_weights", _PATCHIFY), 14, _F8, "0.25M", _D40, 1.0, 3.0),
    )  # fmt: skip


FAMILY = Family(
    name="infinity",
    transformer=Network(
        kind="Infinity", config=InfinityConfig, build=Infinity, load=load_transformer, infer=_infer, plain=_plain
    ),
    autoencoder=Network(
        kind="autoencoder",
        config=AutoencoderConfig,
        build=Autoencoder,
        load=load_autoencoder,
        infer=_infer_autoencoder,
        plain=autoencoder_state,
    ),
    tokenizer=BSQTokenizer,
    symbols=_bits,
    guidance=_guidance,
    conditionings=(*OWN, _T5_XL),
    random_conditioner=_random_text,
    sizes=_sizes,
    published=_published,
    shape=_shape,
    text=_text,
    is_fixed_size=False,
    can_smooth=False,
    other_autoencoders=tuple(f"infinity_vae_{name}" for name in ("d24", "d32", "d32_reg", "d64")),
    # Scripts of the publisher use the first name.
    autoencoder_aliases={"infinity_vae_d32_reg": "infinity_vae_d32reg"},
    adapter="foveate.adapters.infinity:OfficialInfinity",
)
