"""Policies that break the contract, one rule each: what `foveate.testing` must see."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy
from foveate.core.selection import MaskSelection


class OverCeiling(Bound):
    """Says that the last scales do not run, and runs them."""

    def plan(self, scale: int, signals: Any, state: Any) -> tuple[ScalePlan, Any]:
        return ScalePlan(), state

    def ceiling(self, scale: int) -> ScalePlan:
        return ScalePlan(runs=scale < 4)


class Forgetful(Bound):
    """Plans another mask every time it is asked."""

    directives = (Directive.TOKENS,)

    def __init__(self, num_tokens: tuple[int, ...]) -> None:
        self.num_tokens, self.asked = num_tokens, 0

    def plan(self, scale: int, signals: Any, state: Any) -> tuple[ScalePlan, Any]:
        self.asked += 1
        mask_Bl = torch.arange(self.num_tokens[scale])[None] != self.asked % self.num_tokens[scale]
        if scale < 2:
            return ScalePlan(), state
        return ScalePlan(selections=(MaskSelection(mask_Bl=mask_Bl, kept=self.num_tokens[scale] - 1),)), state


class Idle(Bound):
    """Promises and does nothing."""

    directives = (Directive.TOKENS,)

    def plan(self, scale: int, signals: Any, state: Any) -> tuple[ScalePlan, Any]:
        return ScalePlan(), state


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken(Policy):
    """Breaks the rule that its setting names."""

    name: ClassVar[str] = "broken"
    rule: str = "none"

    @classmethod
    def neutral(cls) -> "Broken":
        """Nothing broken."""
        return cls()

    def bind(self, schedule: Any, shape: Any) -> Bound:
        """By name."""
        kinds = {"ceiling": OverCeiling, "idle": Idle}
        if self.rule == "state":
            return Forgetful(tuple(scale.num_tokens for scale in schedule.scales))
        return kinds[self.rule]() if self.rule in kinds else Quiet()


class Quiet(Bound):
    """Runs everything."""

    def plan(self, scale: int, signals: Any, state: Any) -> tuple[ScalePlan, Any]:
        return ScalePlan(), state


BROKEN = [
    (Broken, [Broken(rule="ceiling")], "more than its ceiling"),
    (Broken, [Broken(rule="state")], "gave another plan"),
    (Broken, [Broken(rule="idle")], "changed nothing on any model"),
    (Broken, [], "at least one setting"),
]
