"""SkipScales: the last scales do not run and add nothing. A trivial control that is hard to beat."""

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals


class BoundSkipScales(Bound):
    """Runs the scales before `first_skipped`."""

    def __init__(self, first_skipped: int, num_scales: int) -> None:
        self.first_skipped = first_skipped
        self.directives = (Directive.SCALES,) if first_skipped < num_scales else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Runs the scale or not."""
        return ScalePlan(runs=scale < self.first_skipped), state


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipScales(Policy):
    """Leaves out the last `count` scales (at least the first one always runs)."""

    name: ClassVar[str] = "skip-scales"
    dial: ClassVar[str] = "count"
    is_dial_coarse: ClassVar[bool] = True
    count: int = 1

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.count >= 0, "count", "0 or more", self.count)

    @classmethod
    def neutral(cls) -> "SkipScales":
        """Leaves out none."""
        return cls(count=0)

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "SkipScales":
        """Leaves out all scales but the first at level 0, none at 1."""
        del shape
        return self.replace(count=round((1 - level) * (len(schedule) - 1)))

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule.

        Raises:
            FoveateError: No scale would be left.
        """
        require(self.count < len(schedule), "count", f"less than the {len(schedule)} scales", self.count)
        return BoundSkipScales(len(schedule) - self.count, len(schedule))
