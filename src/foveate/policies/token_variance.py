"""TokenVariance: keeps the tokens that differ most from the mean of their map. A control for LD-Pruning's energy.

LD-Pruning (arXiv 2606.00310) compares its energy with this score and does not say which hidden states it reads. Ours
are those in front of a block of the previous scale, conditional branch; scores are resized bilinearly to the coming
grid. The mean is over the tokens that ran there. Where a token did not run its score is 0, so that areas once dropped
come back only beside kept ones.
Axes: B images, l tokens, C width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.policy import Bound, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import SublayerInput
from foveate.policies.scores import BoundByScore, KeptShare, block_at, require_kept


def distances_to_mean(hidden_BlC: Float[Tensor, "B l C"]) -> Float[Tensor, "B l"]:
    """Squared distance of each hidden state to the mean of its map; all-zero ones are left out and get 0."""
    ran_Bl1 = (hidden_BlC != 0).any(-1, keepdim=True)
    mean_B1C = hidden_BlC.sum(1, keepdim=True) / ran_Bl1.sum(1, keepdim=True).clamp_min(1)
    return ((hidden_BlC - mean_B1C) * ran_Bl1).square().sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenVariance(Policy):
    """Keeps `keep_ratio` of the tokens, in (0, 1], of each of the last `num_scales` scales: the farthest from the mean.

    The hidden states are those in front of `block`, negative from the end. `fill` says what the others commit: "base"
    the previous residual, "zero" nothing.
    """

    name: ClassVar[str] = "token-variance"
    dial: ClassVar[str] = "keep_ratio"
    keep_ratio: float = 0.5
    num_scales: int = 3
    fill: Literal["base", "zero"] = "base"
    block: int = -1

    def __post_init__(self) -> None:
        """Checks the fields."""
        require_kept(self.keep_ratio, self.num_scales, self.fill)

    @classmethod
    def neutral(cls) -> "TokenVariance":
        """Keeps everything."""
        return cls(keep_ratio=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs.

        Raises:
            FoveateError: The model has no such block.
        """
        kept = KeptShare(label=self.name, keep_ratio=self.keep_ratio, num_scales=self.num_scales, fill=self.fill)
        signal = SublayerInput(block=block_at(self.block, shape.num_blocks))
        return BoundByScore(kept, schedule, signal, distances_to_mean)
