"""What a policy may ask the engine to record while a scale runs; nothing else is computed, stored or synchronised.

A signal is named by a value: `Signal.RESIDUAL`, or `BlockChange(first=3, end=4)` where it has settings.
Axes: B images, (h, w) the latent grid of the scale, l its tokens, k tokens that ran, Z latent channels, V outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.schedule import Grid


class Signal(Enum):
    """Signals without settings."""

    RESIDUAL = "residual"
    """What the scale added to the latent, on its own latent grid. Free."""
    F_HAT = "f_hat"
    """The latent after the scale, on the last latent grid. Free."""
    LOGITS = "logits"
    """Head outputs of every branch that ran, before guidance and temperature; a cached difference of head inputs has
    already guided tokens that ran in one branch. Costs the unconditional head where guidance does not read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChange:
    """How much the blocks `first` up to `end` change each token: mean over channels of |after - before| ** `power`.

    (B, l), float32. `branches`: the conditional one, or the mean over those that ran. A token that skipped a block
    counts with what filled it there. Costs a copy of the hidden states per block.
    """

    first: int
    end: int
    power: Literal[1, 2] = 1
    branches: Literal["conditional", "mean"] = "conditional"


@dataclass(frozen=True, kw_only=True, slots=True)
class SublayerInput:
    """Hidden states in front of a sublayer, conditional branch: (B, l, C), float32, zero where a token did not run.

    Costs one copy of them.
    """

    block: int
    sublayer: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionEntropy:
    """Entropy of each token's self-attention in one block, in nats, mean over heads: (B, l), conditional branch.

    Zero where a token did not run. H = lse - scale q (P K): costs one more attention pass of the block.
    """

    block: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """The latent after the scale, resized to `side` x `side` latents and decoded: pixels in [-1, 1], (B, 3, Y, X).

    Costs a decoder pass of that size.
    """

    side: int


Record = Signal | BlockChange | SublayerInput | AttentionEntropy | Decoded
"""The name of a signal: hashable, equal for equal settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchLogits:
    """Raw head logits of one image at the tokens that ran: before temperature and guidance.

    `index_k` holds their places in the grid, None for all of them in order. The unconditional branch may have run on
    some of these only: `uncond_index_u` are its places among the k (None for all); `uncond_kV` is None where it did not
    run at all.
    """

    cond_kV: Float[Tensor, "k V"]
    uncond_kV: Float[Tensor, "u V"] | None = None
    index_k: Int[Tensor, " k"] | None = None
    uncond_index_u: Int[Tensor, " u"] | None = None

    def both(self) -> tuple[Float[Tensor, "u V"], Float[Tensor, "u V"]] | None:
        """Conditional and unconditional logits at the tokens that ran in both branches; None if there is none."""
        if self.uncond_kV is None:
            return None
        cond_uV = self.cond_kV if self.uncond_index_u is None else self.cond_kV[self.uncond_index_u]
        return cond_uV, self.uncond_kV


@dataclass(frozen=True, kw_only=True, slots=True)
class Signals:
    """What the latest scale that ran left behind; what was not asked for is None, or not in `values`.

    `logits` has one entry per image. `values` holds the signals with settings. `remaining_ms` is the time until the
    request's deadline before the coming scale, in steps that whoever set the deadline chose; None without a deadline.
    """

    scale: int
    grid: Grid
    residual_BZhw: Float[Tensor, "B Z h w"] | None = None
    f_hat_BZHW: Float[Tensor, "B Z H W"] | None = None
    logits: tuple[BranchLogits, ...] | None = None
    values: Mapping[Record, Tensor] = field(default_factory=dict)
    remaining_ms: float | None = None

    def __getitem__(self, record: Record) -> Tensor:
        """The value of a signal with settings.

        Raises:
            PlanConflictError: It was not recorded at that scale.
        """
        if record not in self.values:
            raise PlanConflictError(f"{record} was not recorded at scale {self.scale}")
        return self.values[record]
