"""What families of codebooks share: the VQ autoencoder and linear guidance."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from foveate.core.guidance import GuidanceSchedule
from foveate.core.protocols import ScaleTokenizer
from foveate.families.family import Network
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.tokenizers.vq import VQTokenizer
from foveate.weights.stored import State
from foveate.weights.vq import infer_vq_config, load_vq, vq_state


def _infer(state: State, _facts: Mapping[str, Any]) -> AutoencoderConfig:
    return infer_vq_config(state)


VQ = Network(kind="VQ", config=AutoencoderConfig, build=Autoencoder, load=load_vq, infer=_infer, plain=vq_state)


def vq_tokenizer(autoencoder: Autoencoder, _patch: int) -> ScaleTokenizer:
    """The tokenizer; a token holds one latent."""
    return VQTokenizer(autoencoder)


def quantiser(autoencoder: Autoencoder) -> tuple[nn.Module, ...]:
    """What every scale reads of the autoencoder."""
    return (autoencoder.quantize,)


def codes(transformer: Any, autoencoder: AutoencoderConfig, _patch: int) -> tuple[str, str]:  # noqa: ANN401 - of any family
    """What a token holds, as the transformer wants and the autoencoder offers it."""
    wanted, offered = (f"{c.codebook_size} codes of {c.latent_channels} channels" for c in (transformer, autoencoder))
    return wanted, offered


def linear_guidance(cfg: tuple[float, ...], window: tuple[int, int | None]) -> GuidanceSchedule:
    """Guidance that grows from nothing to `cfg` over the scales, within a window of them."""
    return GuidanceSchedule.from_var(cfg, len(cfg), *window)
