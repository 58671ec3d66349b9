"""DropBranch: no unconditional branch on the last scales. A trivial control that is hard to beat."""

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals


class BoundDropBranch(Bound):
    """Keeps both branches before `first_single`."""

    def __init__(self, first_single: int, num_scales: int) -> None:
        self.first_single = first_single
        self.directives = (Directive.BRANCH,) if first_single < num_scales else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Stops the unconditional branch of every image from one scale on."""
        return ScalePlan(unconditional=(False,) if scale >= self.first_single else None), state


@dataclass(frozen=True, kw_only=True, slots=True)
class DropBranch(Policy):
    """Runs the conditional branch alone on the last `count` scales."""

    name: ClassVar[str] = "drop-branch"
    dial: ClassVar[str] = "count"
    is_dial_coarse: ClassVar[bool] = True
    count: int = 2

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.count >= 0, "count", "0 or more", self.count)

    @classmethod
    def neutral(cls) -> "DropBranch":
        """Keeps both branches to the end."""
        return cls(count=0)

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "DropBranch":
        """Drops the branch everywhere at level 0, nowhere at 1."""
        del shape
        return self.replace(count=round((1 - level) * len(schedule)))

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; a larger count drops the branch everywhere."""
        return BoundDropBranch(max(len(schedule) - self.count, 0), len(schedule))
