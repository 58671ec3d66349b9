"""Published weights of the VQ autoencoders (VAR, Switti, HART) to ours, without and inside a training checkpoint.

The usage counts of the codebook are dropped: nothing reads them, and their number of scales is that of the training.
Weights of the adversary, which checkpoints of a training hold beside the autoencoder, and of a second decoder (HART's),
which no image goes through, are dropped and named in the log.
Source: the published checkpoints of VAR (arXiv 2404.02905) and HART (arXiv 2410.10812), and their key names.
"""

import logging

import torch

from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.files import some
from foveate.weights.key_map import (
    WeightKind,
    autoencoder_shape,
    axes_of,
    copy_weights,
    count_of,
    declare,
)
from foveate.weights.names import plain_state
from foveate.weights.stored import State, Stored, renamed

declare(
    WeightKind(
        name="VQ",
        role="a VQ autoencoder (VAR, Switti, HART)",
        marks=("quantize.embedding.weight",),
        is_autoencoder=True,
    )
)

_LOG = logging.getLogger("foveate")

_USAGE = "ema_vocab_hit_SV"
_DROPPED = {
    "the training's adversary": ("disc.", "discriminator.", "loss."),
    "a second decoder": ("decoder2.", "post_quant_conv2."),
}


def infer_vq_config(state: State) -> AutoencoderConfig:
    """Reads the shape of a VQ autoencoder off its weights.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = vq_state(state)
    codebook_size, latent_channels = axes_of(state, "quantize.embedding.weight", 2)
    return AutoencoderConfig(
        **autoencoder_shape(state),
        latent_channels=latent_channels,
        codebook_size=codebook_size,
        num_refiners=count_of(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    )


def load_vq(model: Autoencoder, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into an autoencoder; `copy_weights` says what is refused."""
    for what, prefixes in _DROPPED.items():
        dropped = sorted(key for key in plain_state(state, "VQ") if key.startswith(prefixes))
        if dropped:
            _LOG.warning("weights of %s are not loaded: %s", what, some(dropped))
    copy_weights(model, vq_state(state), "VQ autoencoder", dtype)


def vq_state(state: State) -> Stored:
    """An autoencoder's weights without nesting, usage counts and what belongs to no image."""
    own = plain_state(state, "VQ", (_USAGE,))
    dropped = tuple(prefix for prefixes in _DROPPED.values() for prefix in prefixes)
    return renamed(own, {key: key for key in own if not key.startswith(dropped)})
