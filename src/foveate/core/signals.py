"""What a policy may ask the engine to record while a scale runs; nothing else is computed, stored or synchronised.

Axes: B images, (h, w) the latent grid of the scale, l its tokens, k tokens that ran, Z latent channels, V outputs.
"""

from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float
from torch import Tensor

from foveate.core.schedule import Grid


class Signal(Enum):
    """Names of what can be recorded."""

    RESIDUAL = "residual"
    LOGITS = "logits"
    BLOCK_CHANGE = "block_change"
    BLOCK_DELTAS = "block_deltas"


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchLogits:
    """Raw head logits of one image at the tokens that ran in both branches: before temperature and guidance."""

    cond_kV: Float[Tensor, "k V"]
    uncond_kV: Float[Tensor, "k V"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """What the latest scale that ran left behind; fields that were not asked for are None.

    `residual_BZhw` is what the scale added to the latent, on its own latent grid. `logits` has one entry per image,
    None where the unconditional branch did not run. `block_change_Bl` sums, over blocks, the mean absolute delta of
    each token in the conditional branch. (The deltas themselves stay in the engine, which fills from them.)
    """

    scale: int
    grid: Grid
    residual_BZhw: Float[Tensor, "B Z h w"] | None = None
    logits: tuple[BranchLogits | None, ...] | None = None
    block_change_Bl: Float[Tensor, "B l"] | None = None
