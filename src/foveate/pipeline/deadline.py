"""A call with `latency_budget_ms`: levels of its policy, what each takes on this machine, and the clock of the call.

Before the run the first level is chosen whose predicted time fits; before every later scale the time that is left is
compared again, and cheaper levels are stepped to, never back. All images of a call take the same levels. Their files
keep the levels that were taken, as a policy that needs no clock.
"""

import time
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

from foveate.core.cost import ModelShape
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.warnings import CallWarning
from foveate.engine.forecast import forecast_work
from foveate.families.loading import LoadedModel
from foveate.pipeline.budget import request_of
from foveate.pipeline.call import Job
from foveate.pipeline.profile import Profile, load_profile
from foveate.policies.fit_budget import Dial
from foveate.policies.full import Full
from foveate.policies.step_down import StepDown, first_in_time

LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
"""Of the dial, behind the full run."""
_LOWER = (2, 5)
"""How many levels below the first one lie the next ones that a run can step to; the lowest level is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A policy, and what the run takes from each scale to the end of the last one."""

    policy: Policy
    needs_ms: tuple[float, ...]


@lru_cache(maxsize=16)
def levels_of(
    policy: Policy,
    schedule: ScaleSchedule,
    guidance: GuidanceSchedule,
    num_images: int,
    shape: ModelShape,
    profile: Profile,
) -> tuple[Level, ...]:
    """The full run and the levels of a policy's dial, each faster than the one before it; known ones are kept.

    Raises:
        FoveateError: The policy has no dial.
    """
    dial, request = Dial.of(policy, schedule, shape), request_of(schedule, guidance, shape, num_images=num_images)
    found: list[Level] = []
    for setting in (Full(), *(dial.at(level) for level in LEVELS)):
        work = forecast_work(setting.bind(schedule, shape), request, shape)
        ms = profile.scale_ms(work, shape, request.text_tokens())
        needs_ms = tuple(accumulate(reversed(ms)))[::-1]
        if not found or needs_ms[0] < found[-1].needs_ms[0]:
            found.append(Level(policy=setting, needs_ms=needs_ms))
    return tuple(found)


def any_level(policy: Policy, schedule: ScaleSchedule, shape: ModelShape) -> StepDown:
    """A policy that may step to any level: its bounds hold for every call with a deadline.

    Raises:
        FoveateError: The policy has no dial.
    """
    dial = Dial.of(policy, schedule, shape)
    steps = tuple(dict.fromkeys((Full(), *(dial.at(level) for level in LEVELS))))
    return StepDown(steps=steps, needs_ms=((0.0,) * len(schedule),) * len(steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The levels that a call may run at, and what it takes behind its last scale."""

    levels: tuple[Level, ...]
    after_ms: float

    @classmethod
    def of(cls, job: Job, model: LoadedModel) -> "Ladder":
        """The levels of a call.

        Raises:
            FoveateError: This machine has no profile of the model, or the policy has no dial.
        """
        profile, shape = load_profile(model), model.transformer.shape
        height, width = (side * model.spec.stride for side in job.schedule.grids[-1])
        return cls(
            levels=levels_of(job.policy, job.schedule, job.guidance, job.num_images, shape, profile),
            after_ms=profile.after_ms(height * width, job.num_images),
        )

    def policy(self, left_ms: float) -> StepDown:
        """The first level that fits into the time up to the end of the call, and the ones to step down to."""
        num_levels, last = len(self.levels), len(self.levels) - 1
        fitting = (i for i, level in enumerate(self.levels) if level.needs_ms[0] <= left_ms - self.after_ms)
        first = next(fitting, last)
        chosen = [self.levels[i] for i in sorted({first, *(first + n for n in _LOWER), last}) if i < num_levels]
        return StepDown(
            steps=tuple(level.policy for level in chosen), needs_ms=tuple(level.needs_ms for level in chosen)
        )


@dataclass(kw_only=True, slots=True, eq=False)
class Deadline:
    """The clock of one call; what it said before each scale is kept."""

    policy: StepDown
    ends: float
    said: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, ladder: Ladder, budget_ms: float, began: float) -> "Deadline":
        """A call of so many milliseconds that began at a reading of `time.perf_counter`."""
        left_ms = budget_ms - 1e3 * (time.perf_counter() - began)
        return cls(policy=ladder.policy(left_ms), ends=began + (budget_ms - ladder.after_ms) / 1e3)

    def remaining_ms(self, scale: int) -> float:
        """What the best step in reach needs from this scale on, 0 where none is: the same answer to all images."""
        if scale not in self.said:
            left_ms = 1e3 * (self.ends - time.perf_counter())
            fitting = (needs[scale] for needs in self.policy.needs_ms if needs[scale] <= left_ms)
            self.said[scale] = max(fitting, default=0.0)
        return self.said[scale]

    def taken(self) -> Policy:
        """The policy that ran: the one step that was taken, or the steps of all scales."""
        steps, step = [], 0
        for scale in range(len(self.policy.needs_ms[0])):
            if scale in self.said:
                step = first_in_time(self.policy.needs_ms, scale, self.said[scale], step)
            steps.append(step)
        used = sorted(set(steps))
        if len(used) == 1:
            return self.policy.steps[used[0]]
        return StepDown(
            steps=tuple(self.policy.steps[step] for step in used), taken=tuple(used.index(step) for step in steps)
        )


def late(job: Job, total_ms: float) -> tuple[CallWarning, ...]:
    """A warning if a call took longer than it was to."""
    budget_ms = job.asked.get("latency_budget_ms")
    if budget_ms is None or total_ms <= budget_ms:
        return ()
    message = (
        f"the call took {total_ms:.0f} ms, {total_ms - budget_ms:.0f} ms more than latency_budget_ms {budget_ms:g}, "
        f"with {job.policy.spec}; allow more, take a smaller size, or run foveate bench calibrate again"
    )
    return (CallWarning(code="deadline_missed", message=message),)
