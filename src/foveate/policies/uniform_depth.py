"""UniformDepth: every token of the last scales runs the same share of the blocks. The control for a depth per token.

Blocks go in bit-reversal order, as in DepthVAR; a skipped block adds what it added at the latest scale, or nothing.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from foveate.core.cost import ModelShape
from foveate.core.plan import CachedFill, DepthMap, Keep, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals
from foveate.policies.scores import bit_reversal_order


class BoundUniformDepth(Bound):
    """The same depth for every token of the last scales."""

    def __init__(self, policy: "UniformDepth", schedule: ScaleSchedule, num_blocks: int) -> None:
        self.policy, self.schedule = policy, schedule
        self.first = max(len(schedule) - policy.num_scales, 1)
        self.depth = min(num_blocks, max(1, round(policy.keep_ratio * num_blocks)))
        self.order = bit_reversal_order(num_blocks)
        self.is_on = self.depth < num_blocks and self.first < len(schedule)
        self.directives = (Directive.BLOCKS,) if self.is_on else ()

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What blocks added, if skipped ones are filled with it."""
        is_read = self.is_on and self.policy.fill == "cached" and self.first - 1 <= scale < len(self.schedule) - 1
        return frozenset({KeepOutputs()}) if is_read else frozenset()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """One depth for all."""
        if not self.is_on or scale < self.first:
            return ScalePlan(), state
        num_tokens = self.schedule.scales[scale].num_tokens
        depth_Bl = torch.full((1, num_tokens), self.depth, dtype=torch.long, device="cpu")
        counts = tuple(num_tokens * (place < self.depth) for place in range(len(self.order)))
        fill = CachedFill() if self.policy.fill == "cached" else None
        depth = DepthMap(depth_Bl=depth_Bl, order=self.order, counts=counts)
        return ScalePlan(depths=(depth,), fill=fill), state


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformDepth(Policy):
    """Runs `keep_ratio` of the blocks, in (0, 1], for every token of the last `num_scales` scales."""

    name: ClassVar[str] = "uniform-depth"
    keep_ratio: float = 0.5
    num_scales: int = 3
    fill: Literal["cached", "identity"] = "cached"

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.keep_ratio <= 1, "keep_ratio", "in (0, 1]", self.keep_ratio)
        require(self.num_scales >= 0, "num_scales", "0 or more", self.num_scales)
        require(self.fill in ("cached", "identity"), "fill", "cached or identity", self.fill)

    @classmethod
    def neutral(cls) -> "UniformDepth":
        """All blocks."""
        return cls(keep_ratio=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs in full."""
        return BoundUniformDepth(self, schedule, shape.num_blocks)
