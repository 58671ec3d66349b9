"""KVEviction: later scales see the keys and values of the first scales and of the latest ones; the rest is evicted.

The rule of StreamingLLM (arXiv 2309.17453), a few first entries and a window, with whole scales in place of tokens.
HACK (arXiv 2504.09261) and ScaleKV (arXiv 2505.19602) choose by head and by layer; this is a control for such choices.
The cache is allocated at what the rule holds at most. A scale always sees its own tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.plan import ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals

LONGER_THAN_ANY_SCHEDULE = 1000


class BoundKVEviction(Bound):
    """Evicts one scale at a time, as the window moves on."""

    def __init__(self, policy: "KVEviction", num_scales: int) -> None:
        self.policy, self.num_scales = policy, num_scales
        self.directives = (Directive.KEYS,) if any(self.evicted(scale) for scale in range(num_scales)) else ()

    def evicted(self, scale: int) -> tuple[int, ...]:
        """The scale that leaves the window when this one has run; nobody reads the cache after the last scale."""
        leaves = scale - self.policy.window
        return (leaves,) if leaves >= self.policy.keep_first and scale < self.num_scales - 1 else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Everything runs; afterwards a scale may go."""
        return ScalePlan(evict=self.evicted(scale)), state


@dataclass(frozen=True, kw_only=True, slots=True)
class KVEviction(Policy):
    """Keeps keys and values of the first `keep_first` scales and of the latest `window` scales before the running one.

    On a model without a cache it has no effect, and the report says so.
    """

    name: ClassVar[str] = "kv-eviction"
    dial: ClassVar[str] = "window"
    is_dial_coarse: ClassVar[bool] = True
    keep_first: int = 4
    window: int = 3

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.keep_first >= 0, "keep_first", "0 or more", self.keep_first)
        require(self.window >= 0, "window", "0 or more", self.window)

    @classmethod
    def neutral(cls) -> "KVEviction":
        """A window that no scale leaves."""
        return cls(window=LONGER_THAN_ANY_SCHEDULE)

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "KVEviction":
        """No window at level 0, all scales at 1."""
        del shape
        return self.replace(window=round(level * len(schedule)))

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts scales of the full schedule, whether they run or not."""
        return BoundKVEviction(self, len(schedule))
