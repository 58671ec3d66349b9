"""UniformDepth: every token of the last scales runs the same share of the blocks. The control for a depth per token.

It is `blocks-per-scale` with equal shares.
"""

from dataclasses import dataclass
from typing import ClassVar

from foveate.core.cost import ModelShape
from foveate.core.policy import Bound, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.policies.blocks_per_scale import BoundBlocksPerScale, Fill, require_fill


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformDepth(Policy):
    """Runs `keep_ratio` of the blocks, in (0, 1], for every token of the last `num_scales` scales."""

    name: ClassVar[str] = "uniform-depth"
    dial: ClassVar[str] = "keep_ratio"
    is_dial_coarse: ClassVar[bool] = True
    keep_ratio: float = 0.5
    num_scales: int = 3
    fill: Fill = "cached"

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.keep_ratio <= 1, "keep_ratio", "in (0, 1]", self.keep_ratio)
        require(self.num_scales >= 0, "num_scales", "0 or more", self.num_scales)
        require_fill(self.fill)

    @classmethod
    def neutral(cls) -> "UniformDepth":
        """All blocks."""
        return cls(keep_ratio=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs in full."""
        ratios = (self.keep_ratio,) * min(self.num_scales, len(schedule))
        return BoundBlocksPerScale(ratios, self.fill, schedule, shape.num_blocks)
