"""Full: every scale, branch, token and block runs. The neutral element of composition."""

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals


class BoundFull(Bound):
    """Always the default plan."""

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Everything."""
        return ScalePlan(), state


@dataclass(frozen=True, kw_only=True, slots=True)
class Full(Policy):
    """Runs everything: the yardstick of every comparison."""

    name: ClassVar[str] = "full"

    @classmethod
    def neutral(cls) -> "Full":
        """Itself."""
        return cls()

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Nothing to fix."""
        return BoundFull()
