"""A family: how its networks are built and loaded, how its guidance is counted, what its conditions are.

The one table of families. Whatever needs to know more than this about a family belongs into the family's own files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from foveate.core.errors import CheckpointError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.protocols import ScaleTokenizer
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.models.switti import Switti, SwittiConfig
from foveate.models.var import VAR, VARConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.bsq import BSQTokenizer
from foveate.tokenizers.vq import VQTokenizer
from foveate.tokenizers.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from foveate.weights.infinity import (
    infer_autoencoder_config,
    infer_infinity_config,
    load_autoencoder,
    load_transformer,
)
from foveate.weights.stored import State
from foveate.weights.switti import infer_switti_config, load_switti
from foveate.weights.var import infer_var_config, load_var
from foveate.weights.vq import infer_vq_config, load_vq

TransformerConfig = InfinityConfig | VARConfig | SwittiConfig
TokenizerConfig = AutoencoderConfig | VQAutoencoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """One of the two networks of a family: its configuration, the module, and how published weights become it.

    Types meet in the table below: `build` takes a `config` and returns the module that `load` fills. `infer` reads the
    configuration off weights, and off a config.json beside them what leaves no trace in weights.
    """

    config: type
    build: Callable[[Any], Any]
    load: Callable[[Any, State], None]
    infer: Callable[[State, Mapping[str, Any]], Any]


def _no_modules(_autoencoder: nn.Module) -> tuple[nn.Module, ...]:
    return ()


def _quantiser(autoencoder: VQAutoencoder) -> tuple[nn.Module, ...]:
    return (autoencoder.quantize,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the models of a family share.

    Attributes:
        name: As `config.json` holds it.
        transformer: The transformer.
        autoencoder: The network of the tokenizer.
        tokenizer: Makes the tokenizer from its network and the latents along a side of a token.
        symbols: What a token of either network holds, in words that agree where the two belong together.
        guidance: Weights from the published `cfg` of every scale, and the window in which guidance acts.
        conditioners: What can make its conditions.
        has_negatives: Whether a negative prompt can replace the unconditional branch.
        is_fixed_size: Whether a model draws one size alone, its own grids, and no template of the published ratios.
        can_smooth: Whether the published sampler offers `more_smooth`.
        smooths_after_draw: Whether smoothing follows a draw of ids and their filters (`engine.sample.SmoothSampler`).
        null_prompt: The prompt that stands for none, where the model has learned no other; None if it has.
        codebook: The modules of the autoencoder that every scale reads, not only the decoder at the end.
    """

    name: str
    transformer: Network
    autoencoder: Network
    tokenizer: Callable[[Any, int], ScaleTokenizer]
    symbols: Callable[[Any, Any, int], tuple[str, str]]
    guidance: Callable[[tuple[float, ...], tuple[int, int | None]], GuidanceSchedule]
    conditioners: tuple[str, ...]
    has_negatives: bool = True
    is_fixed_size: bool = True
    can_smooth: bool = True
    smooths_after_draw: bool = False
    null_prompt: str | None = None
    codebook: Callable[[Any], tuple[nn.Module, ...]] = _no_modules


def _no_window(cfg: tuple[float, ...], _window: tuple[int, int | None]) -> GuidanceSchedule:
    return GuidanceSchedule.from_infinity(cfg, len(cfg))


def _linear(cfg: tuple[float, ...], window: tuple[int, int | None]) -> GuidanceSchedule:
    return GuidanceSchedule.from_var(cfg, len(cfg), *window)


def _infer_infinity(state: State, _facts: Mapping[str, Any]) -> InfinityConfig:
    return infer_infinity_config(state)


def _infer_autoencoder(state: State, _facts: Mapping[str, Any]) -> AutoencoderConfig:
    return infer_autoencoder_config(state)


def _infer_var(state: State, _facts: Mapping[str, Any]) -> VARConfig:
    return infer_var_config(state)


def _infer_switti(state: State, facts: Mapping[str, Any]) -> SwittiConfig:
    if not isinstance(facts.get("use_ar"), bool):
        raise CheckpointError(
            "Switti weights do not say whether scales see earlier ones; put the config.json with `use_ar` beside them"
        )
    return infer_switti_config(state, use_ar=facts["use_ar"])


def _infer_vq(state: State, _facts: Mapping[str, Any]) -> VQAutoencoderConfig:
    return infer_vq_config(state)


def _vq_tokenizer(autoencoder: VQAutoencoder, _patch: int) -> ScaleTokenizer:
    return VQTokenizer(autoencoder)


def _bits(transformer: InfinityConfig, autoencoder: AutoencoderConfig, patch: int) -> tuple[str, str]:
    return f"{transformer.bits} bits a token", f"{autoencoder.latent_channels * patch**2} bits a token"


def _codes(transformer: VARConfig | SwittiConfig, autoencoder: VQAutoencoderConfig, _patch: int) -> tuple[str, str]:
    wanted, offered = (f"{c.codebook_size} codes of {c.latent_channels} channels" for c in (transformer, autoencoder))
    return wanted, offered


_VQ = Network(config=VQAutoencoderConfig, build=VQAutoencoder, load=load_vq, infer=_infer_vq)

PLACES_CONDITIONER = "minilm-places"
OWN_CONDITIONERS = ("minilm", PLACES_CONDITIONER)
"""Those whose weights lie in the model's own folder; the second one marks tokens with the places of their things."""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="infinity",
            transformer=Network(config=InfinityConfig, build=Infinity, load=load_transformer, infer=_infer_infinity),
            autoencoder=Network(
                config=AutoencoderConfig, build=Autoencoder, load=load_autoencoder, infer=_infer_autoencoder
            ),
            tokenizer=BSQTokenizer,
            symbols=_bits,
            guidance=_no_window,
            conditioners=(*OWN_CONDITIONERS, "t5-xl"),
            is_fixed_size=False,
            can_smooth=False,
        ),
        Family(
            name="var",
            transformer=Network(config=VARConfig, build=VAR, load=load_var, infer=_infer_var),
            autoencoder=_VQ,
            tokenizer=_vq_tokenizer,
            symbols=_codes,
            guidance=_linear,
            conditioners=("imagenet",),
            has_negatives=False,
            smooths_after_draw=True,
            codebook=_quantiser,
        ),
        Family(
            name="switti",
            transformer=Network(config=SwittiConfig, build=Switti, load=load_switti, infer=_infer_switti),
            autoencoder=_VQ,
            tokenizer=_vq_tokenizer,
            symbols=_codes,
            guidance=_linear,
            conditioners=("clip-pair",),
            null_prompt="",
            codebook=_quantiser,
        ),
    )
}


def family_named(name: object) -> Family:
    """The family of a name out of a file.

    Raises:
        CheckpointError: There is none; the families are listed.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]
