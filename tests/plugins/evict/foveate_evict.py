"""KeepRecent: each scale sees only the keys of the latest scales. A toy plug-in: a policy of another package."""

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals


class BoundKeepRecent(Bound):
    """Evicts the scale that leaves the window."""

    def __init__(self, window: int, num_scales: int) -> None:
        self.window, self.num_scales = window, num_scales
        self.directives = (Directive.KEYS,) if window < num_scales - 1 else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """After a scale, the next one sees `window` scales at most."""
        oldest = scale - self.window
        is_read = oldest >= 0 and scale < self.num_scales - 1
        return ScalePlan(evict=(oldest,) if is_read else ()), state


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepRecent(Policy):
    """Keeps keys and values of the latest `window` scales; 0 keeps all."""

    name: ClassVar[str] = "keep-recent"
    window: int = 0

    def __post_init__(self) -> None:
        """Checks the field."""
        require(self.window >= 0, "window", "0 or more", self.window)

    @classmethod
    def neutral(cls) -> "KeepRecent":
        """Keeps all."""
        return cls()

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Nothing to fix."""
        return BoundKeepRecent(self.window or len(schedule), len(schedule))
