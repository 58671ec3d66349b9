"""CachedGuidance: on the last scales the unconditional branch runs on few tokens or on none.

Where it does not run, the difference of the branches at the latest scale that ran both in full guides instead, resized
and damped: w cond + (1 - w) (cond - weight d). Ours; a difference that is one scale old guides better at half its
strength, and on one scale only (docs/policies/cached-guidance.md).
The tokens on which the branch still runs are a lattice.
Axes: l tokens of a scale.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.plan import CachedDifference, Keep, KeepDifference, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals
from foveate.policies.lattice import dither_rank, lowest


class BoundCachedGuidance(Bound):
    """Guides by the difference at the scale in front of `first`, from there on."""

    def __init__(self, policy: "CachedGuidance", schedule: ScaleSchedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.first = max(len(schedule) - policy.count, 1)
        self.is_on = policy.keep_ratio < 1 and self.first < len(schedule)
        directive = Directive.GUIDED_TOKENS if policy.keep_ratio else Directive.BRANCH
        self.directives = (directive,) if self.is_on else ()

    def keeps(self, scale: int) -> frozenset[Keep]:
        """The difference of the last scale that runs both branches in full."""
        return frozenset({KeepDifference()}) if self.is_on and scale == self.first - 1 else frozenset()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Stops the branch, or lets it run on the lowest thresholds."""
        return self._guided(scale, dither_rank(self.schedule.grids[scale])), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens, the first ones."""
        return self._guided(scale, torch.arange(self.schedule.scales[scale].num_tokens, device="cpu"))

    def _guided(self, scale: int, rank_l: Int[Tensor, " l"]) -> ScalePlan:
        if not self.is_on or scale < self.first:
            return ScalePlan()
        difference = CachedDifference(weight=self.policy.weight)
        if not self.policy.keep_ratio:
            return ScalePlan(unconditional=(False,), difference=difference)
        return ScalePlan(unconditional_tokens=(lowest(rank_l, self.policy.keep_ratio),), difference=difference)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedGuidance(Policy):
    """On the last `count` scales the unconditional branch runs on `keep_ratio` of the kept tokens, in [0, 1].

    0 drops the branch. Elsewhere the cached difference guides, times `weight`; 0 leaves the conditional branch alone.
    """

    name: ClassVar[str] = "cached-guidance"
    dial: ClassVar[str] = "keep_ratio"
    count: int = 1
    keep_ratio: float = 0.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.count >= 0, "count", "0 or more", self.count)
        require(0 <= self.keep_ratio <= 1, "keep_ratio", "in [0, 1]", self.keep_ratio)
        is_weight = self.weight >= 0 and math.isfinite(self.weight)
        require(is_weight, "weight", "0 or more", self.weight)

    @classmethod
    def neutral(cls) -> "CachedGuidance":
        """Both branches to the end."""
        return cls(count=0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs both branches."""
        return BoundCachedGuidance(self, schedule)
