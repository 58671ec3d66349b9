"""RandomTokens: keeps a random share of the tokens of the last scales. The control for every token score.

The choice is keyed by (`key`, scale) alone, so it is the same for every image and every run.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from foveate.core.cost import ModelShape
from foveate.core.plan import Base, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.selection import Rule, TokenSelection
from foveate.core.signals import Signals

_BASES = {"base": Base.PREVIOUS, "zero": Base.ZERO, "nearest": Base.NEAREST}


class BoundRandomTokens(Bound):
    """Scores from a keyed generator on the last scales."""

    def __init__(self, policy: "RandomTokens", schedule: ScaleSchedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.first = max(len(schedule) - policy.num_scales, 1)
        is_on = policy.keep_ratio < 1 and self.first < len(schedule)
        self.directives = (Directive.TOKENS,) if is_on else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Keeps the tokens with the highest random scores."""
        if scale < self.first or self.policy.keep_ratio == 1:
            return ScalePlan(), state
        draws = np.random.Philox(key=np.array([self.policy.key, scale], dtype=np.uint64))
        score_l = np.random.Generator(draws).random(self.schedule.scales[scale].num_tokens)
        return self._keep(torch.from_numpy(score_l)), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens, the first ones."""
        if scale < self.first or self.policy.keep_ratio == 1:
            return ScalePlan()
        return self._keep(-torch.arange(self.schedule.scales[scale].num_tokens, device="cpu").double())

    def _keep(self, score_l: torch.Tensor) -> ScalePlan:
        selection = TokenSelection(score_Bl=score_l[None], share=self.policy.keep_ratio, rule=Rule.COUNT)
        weight = self.policy.base_weight
        base_weight_Bl = None if weight == 1 else torch.full((1, 1), weight, dtype=torch.float32, device="cpu")
        return ScalePlan(selections=(selection,), base=_BASES[self.policy.fill], base_weight_Bl=base_weight_Bl)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomTokens(Policy):
    """Keeps `keep_ratio` of the tokens, in (0, 1], of each of the last `num_scales` scales.

    `fill` says what the others commit: "base" the previous residual, "zero" nothing, "nearest" the code of the nearest
    token that ran; times `base_weight`.
    """

    name: ClassVar[str] = "random-tokens"
    dial: ClassVar[str] = "keep_ratio"
    keep_ratio: float = 0.5
    num_scales: int = 3
    fill: Literal["base", "zero", "nearest"] = "base"
    key: int = 0
    base_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.keep_ratio <= 1, "keep_ratio", "in (0, 1]", self.keep_ratio)
        require(self.num_scales >= 0, "num_scales", "0 or more", self.num_scales)
        require(self.fill in _BASES, "fill", " or ".join(_BASES), self.fill)
        require(0 <= self.key < 2**64, "key", "in [0, 2**64)", self.key)
        is_weight = self.base_weight >= 0 and math.isfinite(self.base_weight)
        require(is_weight, "base_weight", "0 or more", self.base_weight)

    @classmethod
    def neutral(cls) -> "RandomTokens":
        """Keeps everything."""
        return cls(keep_ratio=1.0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs."""
        return BoundRandomTokens(self, schedule)
