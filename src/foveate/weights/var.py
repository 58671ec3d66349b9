"""Published weights of the VAR transformers to ours, without and inside a training checkpoint.

Constant buffers (the zero bias of the keys, the levels, the attention mask) may be there or not; everything else has to
fit. Weights of other families are refused by name.
Source: the published checkpoints of VAR (arXiv 2404.02905) and their key names.
"""

import math
from collections.abc import Sequence

import torch

from foveate.core.errors import CheckpointError
from foveate.core.schedule import Grid
from foveate.models.var import GRIDS_256, GRIDS_512, VAR, VARConfig
from foveate.weights.key_map import WeightKind, axes_of, copy_weights, count_of, declare
from foveate.weights.names import plain_state
from foveate.weights.stored import State, Stored

declare(WeightKind(name="VAR", role="a VAR transformer", marks=("class_emb.weight",)))

_CONSTANTS = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking")


def infer_var_config(state: State, grids: Sequence[Grid] | None = None) -> VARConfig:
    """Reads the shape of a VAR transformer off its weights.

    Args:
        state: Weights under their published names, also inside a training checkpoint.
        grids: The schedule that the positions were learned for; None finds it among the two published ones.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, the schedule is unknown or does not fit, or
            the weights are of another family.
    """
    state = var_state(state)
    width, latent_channels = axes_of(state, "word_embed.weight", 2)
    return VARConfig(
        depth=count_of(state, r"blocks\.(\d+)\."),
        width=width,
        heads=math.prod(axes_of(state, "blocks.0.attn.scale_mul_1H11", 4)),
        num_classes=axes_of(state, "class_emb.weight", 2)[0] - 1,
        codebook_size=axes_of(state, "head.weight", 2)[0],
        latent_channels=latent_channels,
        grids=_find_grids(axes_of(state, "pos_1LC", 3)[1], axes_of(state, "lvl_embed.weight", 2)[0], grids),
        shared_aln="shared_ada_lin.1.weight" in state,
        ff_width=axes_of(state, "blocks.0.ffn.fc1.weight", 2)[0],
    )


def load_var(model: VAR, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into a transformer; `copy_weights` says what is refused."""
    copy_weights(model, var_state(state), "transformer", dtype)


def var_state(state: State) -> Stored:
    """A transformer's weights without nesting and constant buffers."""
    return plain_state(state, "VAR", _CONSTANTS)


def _find_grids(num_positions: int, num_scales: int, grids: Sequence[Grid] | None) -> tuple[Grid, ...]:
    """The schedule with that many positions and scales: the given one, else a published one."""
    for known in (GRIDS_256, GRIDS_512) if grids is None else (tuple(grids),):
        if (sum(h * w for h, w in known), len(known)) == (num_positions, num_scales):
            return known
    asked = "no published schedule" if grids is None else f"not the given one, {' '.join(f'{h}x{w}' for h, w in grids)}"
    raise CheckpointError(
        f"pos_1LC and lvl_embed hold {num_positions} positions of {num_scales} scales, {asked}; give the grids"
    )
