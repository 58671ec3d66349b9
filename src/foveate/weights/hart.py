"""Published HART weights to ours: reads the shape off them and refuses what it does not know.

Two constant buffers may be there or not; the mask alone takes 380 MB and is never allocated here. The number of heads
is in no shape: `config.json` beside the weights says it. The autoencoder is VAR's (`weights.vq`).
Source: the published checkpoint of HART (arXiv 2410.10812) and its key names.
"""

import torch

from foveate.models.hart import HART, HARTConfig
from foveate.weights.key_map import WeightKind, axes_of, copy_weights, count_of, declare
from foveate.weights.names import plain_state
from foveate.weights.stored import State, Stored

declare(WeightKind(name="HART", role="a HART transformer", marks=("context_embed.weight",)))

_CONSTANTS = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking")


def infer_hart_config(state: State, *, heads: int, text_tokens: int = 300) -> HARTConfig:
    """Reads the shape of a HART transformer off its weights.

    Args:
        state: Weights under their published names.
        heads: Of the attentions: `config.json` beside the weights says it, they do not.
        text_tokens: Of every prompt, padding included.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = hart_state(state)
    width, latent_channels = axes_of(state, "word_embed.weight", 2)
    return HARTConfig(
        depth=count_of(state, r"blocks\.(\d+)\."),
        width=width,
        heads=heads,
        codebook_size=axes_of(state, "head.weight", 2)[0],
        latent_channels=latent_channels,
        text_width=axes_of(state, "context_embed.weight", 2)[1],
        text_tokens=text_tokens,
        ff_width=axes_of(state, "blocks.0.ffn.gate_proj.weight", 2)[0],
        diff_width=axes_of(state, "diffloss.net.cond_embed.weight", 2)[0],
        diff_depth=count_of(state, r"diffloss\.net\.res_blocks\.(\d+)\."),
    )


def load_hart(model: HART, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into a transformer; `copy_weights` says what is refused."""
    copy_weights(model, hart_state(state), "transformer", dtype)


def hart_state(state: State) -> Stored:
    """A transformer's weights without nesting and constant buffers."""
    return plain_state(state, "HART", _CONSTANTS)
