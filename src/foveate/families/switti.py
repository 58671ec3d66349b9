"""The Switti family (arXiv 2412.01819): VAR's codebook, text of two CLIP encoders, one square size.

Source of the published entries: model cards and inference scripts of Switti (Apache-2.0).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from foveate.conditioning.clip import CLIP_BIG_G, CLIP_L, CLIP_TOKENS, ClipPair
from foveate.conditioning.text import Conditioner, RandomPooledText, RandomText
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.schedule import Grid
from foveate.families.family import Conditioning, Family, Network, TextEncoderFiles, TextShape
from foveate.families.spec import Defaults, ModelSpec, Published, WeightSource, budget_of
from foveate.families.vq import VQ, codes, linear_guidance, quantiser, vq_tokenizer
from foveate.models.switti import Switti, SwittiConfig
from foveate.models.var import GRIDS_512
from foveate.tokenizers.autoencoder import VQ_F16, AutoencoderConfig
from foveate.weights.stored import State
from foveate.weights.switti import infer_switti_config, load_switti, switti_state

_GRIDS_1024: tuple[Grid, ...] = tuple((n, n) for n in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))


def _infer(state: State, facts: Mapping[str, Any]) -> SwittiConfig:
    if not isinstance(facts.get("use_ar"), bool):
        raise CheckpointError(
            "Switti weights do not say whether scales see earlier ones; put the config.json with `use_ar` beside them"
        )
    return infer_switti_config(state, use_ar=facts["use_ar"])


def _read_clips(files: TextEncoderFiles) -> Conditioner:
    if len(files.places) != 2:  # noqa: PLR2004 - a pair
        raise FoveateError(f"{files.model} has two text encoders of its own; leave text_encoder out")
    return ClipPair.from_pretrained(
        *files.places, dtype=files.dtype, device=files.device, local_files_only=files.local_files_only
    )


def _random_text(config: SwittiConfig, device: torch.device) -> Conditioner:
    tokens = RandomText(width=config.text_width, max_tokens=CLIP_TOKENS, device=device)
    return RandomPooledText(tokens=tokens, pooled_width=config.pooled_width)


def _text(config: SwittiConfig) -> TextShape:
    return TextShape(tokens=CLIP_TOKENS, width=config.text_width)


def _sizes(transformer: SwittiConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    """The weights tell how many scales there are, and the published schedules differ in that."""
    by_levels = {len(grids): grids for grids in (GRIDS_512, _GRIDS_1024)}
    if transformer.num_levels not in by_levels:
        wanted = " or ".join(map(str, by_levels))
        raise CheckpointError(f"a Switti model has {wanted} scales, got {transformer.num_levels}")
    grids = by_levels[transformer.num_levels]
    return {"grids": grids, "budgets": (budget_of(grids, autoencoder.stride),)}


def _shape(config: SwittiConfig) -> SwittiConfig:
    return replace(config, ff_width=config.hidden)


_CLIP_PAIR = Conditioning(name="clip-pair", parameters=123_060_480 + 693_021_440, read=_read_clips)


def _entry(name: str, repo: str, grids: tuple[Grid, ...], *, use_ar: bool) -> Published:
    """A published model; all of them have the same shape."""
    autoencoder = VQ_F16
    # The model card of the large ones guides up to scale 11 and samples the three scales behind it almost greedily.
    is_large = grids == _GRIDS_1024
    temperatures = (1.0,) * 11 + (0.1,) * 3
    shape = SwittiConfig(
        depth=30,
        width=1920,
        heads=30,
        codebook_size=autoencoder.codebook_size,
        latent_channels=autoencoder.latent_channels,
        num_levels=len(grids),
        use_ar=use_ar,
    )
    return Published(
        spec=ModelSpec(
            name=name,
            family=FAMILY.name,
            transformer=shape,
            autoencoder=autoencoder,
            conditioner=_CLIP_PAIR.name,
            budgets=(budget_of(grids, autoencoder.stride),),
            ratios=("1:1",),
            grids=grids,
            defaults=Defaults(
                guidance_scale=6.0,
                temperature=temperatures if is_large else 1.0,
                top_k=400,
                top_p=0.95,
                guidance_window=(0, 11) if is_large else (0, None),
                more_smooth=True,
                smooth_start=2,
            ),
        ),
        transformer=WeightSource(repo=repo, path=""),
        autoencoder=WeightSource(repo="yresearch/VQVAE-Switti", path=""),
        text_encoders=(CLIP_L, CLIP_BIG_G),
        licence="Apache-2.0",
    )


def _published() -> tuple[Published, ...]:
    return (
        _entry("switti-512", "yresearch/Switti", GRIDS_512, use_ar=False),
        _entry("switti-512-ar", "yresearch/Switti-AR", GRIDS_512, use_ar=True),
        _entry("switti-1024", "yresearch/Switti-1024", _GRIDS_1024, use_ar=False),
        _entry("switti-1024-ar", "yresearch/Switti-1024-AR", _GRIDS_1024, use_ar=True),
    )


FAMILY = Family(
    name="switti",
    transformer=Network(
        kind="Switti",
        config=SwittiConfig,
        build=Switti,
        load=load_switti,
        infer=_infer,
        plain=switti_state,
        unseen={"use_ar": False},
    ),
    autoencoder=VQ,
    tokenizer=vq_tokenizer,
    symbols=codes,
    guidance=linear_guidance,
    conditionings=(_CLIP_PAIR,),
    random_conditioner=_random_text,
    sizes=_sizes,
    published=_published,
    shape=_shape,
    text=_text,
    null_prompt="",
    codebook=quantiser,
)
