"""AttentionEntropy: ranks tokens by the entropy of their self-attention, the signal of ToProVAR and NOVA.

NOVA (arXiv 2602.01345) drops tokens of low entropy, so `polarity` is "high" by default; "low" is the opposite. Both
methods also derive the scales and the ratios from entropies; we take the token score alone, at a fixed keep ratio, so
that it stands beside the other scores at equal cost. Ours as well: the entropy is that of one block at the previous
scale, mean over heads, conditional branch, resized bilinearly to the coming grid.
Where a token did not run there it ranks last, so that areas once dropped come back only beside kept ones.
Axes: B images, l tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.policy import Bound, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import AttentionEntropy
from foveate.policies.scores import BoundByScore, KeptShare, block_at, require_kept

Polarity = Literal["low", "high"]


def entropy_scores(entropy_Bl: Float[Tensor, "B l"], polarity: Polarity) -> Float[Tensor, "B l"]:
    """The entropy itself, or how far it lies below the largest; 0 where a token did not run, which has exactly 0."""
    if polarity == "high":
        return entropy_Bl
    below_Bl = entropy_Bl.amax(-1, keepdim=True) - entropy_Bl
    return torch.where(entropy_Bl > 0, below_Bl, torch.zeros_like(below_Bl))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionEntropyTokens(Policy):
    """Keeps `keep_ratio` of the tokens, in (0, 1], of each of the last `num_scales` scales, by entropy of attention.

    `polarity` says which entropies are kept; `block`, negative from the end, whose attention is read. `fill` says what
    the others commit: "base" the previous residual, "zero" nothing.
    """

    name: ClassVar[str] = "attention-entropy"
    dial: ClassVar[str] = "keep_ratio"
    keep_ratio: float = 0.5
    num_scales: int = 3
    fill: Literal["base", "zero"] = "base"
    block: int = -1
    polarity: Polarity = "high"

    def __post_init__(self) -> None:
        """Checks the fields."""
        require_kept(self.keep_ratio, self.num_scales, self.fill)
        require(self.polarity in ("low", "high"), "polarity", "low or high", self.polarity)

    @classmethod
    def neutral(cls) -> "AttentionEntropyTokens":
        """Keeps everything."""
        return cls(keep_ratio=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs.

        Raises:
            FoveateError: The model has no such block.
        """
        kept = KeptShare(label=self.name, keep_ratio=self.keep_ratio, num_scales=self.num_scales, fill=self.fill)
        signal = AttentionEntropy(block=block_at(self.block, shape.num_blocks))
        return BoundByScore(kept, schedule, signal, partial(entropy_scores, polarity=self.polarity))
