"""Published Switti weights to ours: reads the shape off them and refuses what it does not know.

Two constant buffers may be there or not; the mask alone takes 357 MB at 1024 pixels and is never allocated here.
Source: the published checkpoints of Switti (arXiv 2412.01819) and their key names.
"""

import torch

from foveate.models.switti import Switti, SwittiConfig
from foveate.weights.key_map import WeightKind, axes_of, copy_weights, count_of, declare
from foveate.weights.names import plain_state
from foveate.weights.stored import State, Stored

declare(WeightKind(name="Switti", role="a Switti transformer", marks=("crop_embed.weight",)))

_CONSTANTS = ("lvl_1L", "attn_bias_for_masking")
_HEAD_WIDTH = 64
"""Of all published models."""


def infer_switti_config(state: State, *, use_ar: bool, heads: int | None = None) -> SwittiConfig:
    """Reads the shape of a Switti transformer off its weights.

    Args:
        state: Weights under their published names.
        use_ar: Whether a scale sees the earlier ones: `config.json` beside the weights says it, they do not.
        heads: Of the attentions; None for heads 64 wide, as published.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = switti_state(state)
    num_levels, width = axes_of(state, "lvl_embed.weight", 2)
    return SwittiConfig(
        depth=count_of(state, r"blocks\.(\d+)\."),
        width=width,
        heads=heads or max(width // _HEAD_WIDTH, 1),
        codebook_size=axes_of(state, "head.weight", 2)[0],
        latent_channels=axes_of(state, "word_embed.weight", 2)[1],
        num_levels=num_levels,
        use_ar=use_ar,
        text_width=axes_of(state, "blocks.0.cross_attn.to_kv.weight", 2)[1],
        pooled_width=axes_of(state, "text_pooler.weight", 2)[1],
        ff_width=axes_of(state, "blocks.0.ffn.gate_proj.weight", 2)[0],
    )


def load_switti(model: Switti, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into a transformer; `copy_weights` says what is refused.

    The frequencies of the crop embedding stay in float32 whatever the dtype: angles are hundreds of times as large, so
    bfloat16 would turn them by whole circles.
    """
    tensors = switti_state(state)
    copy_weights(model, tensors, "transformer", dtype)
    model.crop_embed.weight.data = tensors["crop_embed.weight"].to(model.device, torch.float32, copy=True)


def switti_state(state: State) -> Stored:
    """A transformer's weights without nesting and constant buffers."""
    return plain_state(state, "Switti", _CONSTANTS)
