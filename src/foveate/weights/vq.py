"""Published weights of the VQ autoencoders (VAR, Switti) to ours, without and inside a training checkpoint.

The usage counts of the codebook are dropped: nothing reads them, and their number of scales is that of the training.
Weights of the adversary, which checkpoints of a training hold beside the autoencoder, are dropped and named in the log.
Source: the published checkpoints of VAR (arXiv 2404.02905) and their key names.
"""

import logging

import torch

from foveate.tokenizers.vq_autoencoder import VQAutoencoder, VQAutoencoderConfig
from foveate.weights.files import some
from foveate.weights.key_map import WeightKind, axes_of, copy_weights, count_of, declare, refuse_foreign
from foveate.weights.names import plain_names
from foveate.weights.stored import State, renamed

declare(
    WeightKind(
        name="VQ", role="a VQ autoencoder (VAR, Switti)", marks=("quantize.embedding.weight",), is_autoencoder=True
    )
)

_LOG = logging.getLogger("foveate")

_USAGE = "quantize.ema_vocab_hit_SV"
_ADVERSARY = ("disc.", "discriminator.", "loss.")


def infer_vq_config(state: State) -> VQAutoencoderConfig:
    """Reads the shape of a VQ autoencoder off its weights.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = vq_state(state)
    base = axes_of(state, "encoder.conv_in.weight", 4)[0]
    levels = count_of(state, r"encoder\.down\.(\d+)\.")
    widths = [axes_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)]
    codebook_size, latent_channels = axes_of(state, "quantize.embedding.weight", 2)
    return VQAutoencoderConfig(
        latent_channels=latent_channels,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        num_res_blocks=count_of(state, r"encoder\.down\.0\.block\.(\d+)\."),
        codebook_size=codebook_size,
        num_refiners=count_of(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
    )


def load_vq(model: VQAutoencoder, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into an autoencoder.

    Args:
        model: Is changed; left as it was when loading is refused.
        state: Weights under their published names, also inside a training checkpoint.
        dtype: Changes the model's dtype; None keeps it.

    Raises:
        CheckpointError: A weight is missing, unknown or of another shape, or the weights are of another family.
    """
    own = vq_state(state)
    dropped = sorted(key for key in own if key.startswith(_ADVERSARY))
    if dropped:
        _LOG.warning("weights of the training's adversary are not loaded: %s", some(dropped))
    copy_weights(model, renamed(own, {key: key for key in own if key not in dropped}), "VQ autoencoder", dtype)


def vq_state(state: State) -> State:
    """An autoencoder's weights without nesting and usage counts."""
    state = plain_names(state, "VQ")
    refuse_foreign(state, "VQ")
    return renamed(state, {key: key for key in state if key != _USAGE})
