"""StepDown: one of several policies plans each scale, each step cheaper than the one before it, and never back up.

`taken` says which step plans each scale. Without it time decides: before a scale, the first step is taken whose time
for the rest of the run, `needs_ms`, is still there (`Signals.remaining_ms`). A call with `latency_budget_ms` builds
such a policy from a dial and a profile of the machine, and its images keep the steps that were taken, so that they can
be made again without a clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.plan import Keep, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Record, Signals


def first_in_time(needs_ms: Sequence[Sequence[float]], scale: int, remaining_ms: float, least: int) -> int:
    """The first step from `least` on that can run the rest in the time left; the last step where none can."""
    for step in range(least, len(needs_ms)):
        if needs_ms[step][scale] <= remaining_ms:
            return step
    return len(needs_ms) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The step of the latest scale, and the state of every step's policy."""

    step: int
    states: tuple[Any, ...]


class BoundStepDown(Bound):
    """Asks all steps that may be taken for their plans, so that each knows its past, and hands on the plan of one.

    `highest` has for each scale the first step that may plan it.
    """

    def __init__(self, policy: "StepDown", bounds: Mapping[int, Bound], highest: tuple[int, ...]) -> None:
        self.policy, self.bounds, self.highest = policy, dict(bounds), highest
        used = [bounds[step] for step in sorted(set(highest))] if bounds else []
        self.directives: tuple[Directive, ...] = tuple(dict.fromkeys(d for bound in used for d in bound.directives))
        self.notes = tuple(dict.fromkeys(note for bound in used for note in bound.notes))
        is_fixed = bool(policy.taken) or len(self.bounds) < 2
        self.is_static = is_fixed and all(bound.is_static for bound in self.bounds.values())
        for scale in range(len(highest)):
            for step in self._choices(scale):
                self._refuse_return(scale, step)
                self._refuse_overwritten(scale, step)

    def _choices(self, scale: int) -> tuple[int, ...]:
        """Steps that may plan a scale; the first scale has no time to go by."""
        is_open = scale > 0 and not self.policy.taken
        return tuple(self.bounds) if is_open or not self.bounds else (self.highest[scale],)

    def _refuse_return(self, scale: int, step: int) -> None:
        """Refuses a step that runs the unconditional branch where a step before it may have dropped it.

        Raises:
            PlanConflictError: Names both.
        """
        if not any(plan.runs and not _drops(plan) for plan in self.bounds[step].ceilings(scale)):
            return
        for before in range(scale):
            for other in self._choices(before):
                if other < step and any(_drops(plan) for plan in self.bounds[other].ceilings(before)):
                    raise PlanConflictError(
                        f"step-down: {self.policy.steps[step].spec} runs both branches at scale {scale}, but "
                        f"{self.policy.steps[other].spec} drops one at scale {before}, and it cannot return; "
                        "give the step that drops it last"
                    )

    def _refuse_overwritten(self, scale: int, step: int) -> None:
        """Refuses a step whose fill would find what another step keeps in the place of what it keeps itself.

        Raises:
            PlanConflictError: Names the step.
        """
        bound = self.bounds[step]
        for fill in (plan.fill for plan in bound.ceilings(scale) if plan.fill is not None and plan.runs):
            own = max((s for s in range(scale) if _keeps_outputs(bound, s)), default=-1)
            source = own if fill.source is None else fill.source
            for other in range(source + 1, scale):
                if _keeps_outputs(self, other):
                    raise PlanConflictError(
                        f"step-down: {self.policy.steps[step].spec} fills scale {scale} with what it kept up to scale "
                        f"{source}, but another step keeps scale {other} in its place; let all steps fill from the "
                        "same scale"
                    )

    def record(self, scale: int) -> frozenset[Record]:
        """What any step may read."""
        return frozenset[Record]().union(*(bound.record(scale) for bound in self.bounds.values()))

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What any step may fill from."""
        return frozenset[Keep]().union(*(bound.keeps(scale) for bound in self.bounds.values()))

    def start(self) -> _State:
        """The first step."""
        return _State(step=0, states=tuple(bound.start() for bound in self.bounds.values()))

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """The plan of the step that is taken."""
        if not self.bounds:
            return ScalePlan(), state
        pairs = zip(self.bounds.items(), state.states, strict=True)
        answers = {step: bound.plan(scale, signals, own) for (step, bound), own in pairs}
        step = self.highest[scale]
        if not self.policy.taken:
            step = state.step
            if self.policy.needs_ms and signals is not None and signals.remaining_ms is not None:
                step = first_in_time(self.policy.needs_ms, scale, signals.remaining_ms, step)
        return answers[step][0], _State(step=step, states=tuple(own for _, own in answers.values()))

    def ceiling(self, scale: int) -> ScalePlan:
        """That of the highest step that may plan the scale."""
        return self.bounds[self.highest[scale]].ceiling(scale) if self.bounds else ScalePlan()

    def ceilings(self, scale: int) -> tuple[ScalePlan, ...]:
        """Those of every step that may be taken."""
        plans = [plan for step in self._choices(scale) for plan in self.bounds[step].ceilings(scale)]
        return tuple(plans) or (ScalePlan(),)


def _drops(plan: ScalePlan) -> bool:
    return plan.runs and plan.unconditional is not None and not any(plan.unconditional)


def _keeps_outputs(bound: Bound, scale: int) -> bool:
    return any(isinstance(keep, KeepOutputs) for keep in bound.keeps(scale))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDown(Policy):
    """Steps down through `steps`, the one with the most compute first.

    `taken` has the steps of the last scales, counted from 0 and never falling; scales before them take the first step.
    `needs_ms` has for each step and scale of the schedule the milliseconds that the rest of the run takes with it; it
    decides where `taken` is empty and the call has a deadline.
    """

    name: ClassVar[str] = "step-down"
    steps: tuple[Policy, ...] = ()
    taken: tuple[int, ...] = ()
    needs_ms: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        """Checks the fields."""
        count = len(self.steps)
        is_ok = all(0 <= step < count for step in self.taken) and all(a <= b for a, b in pairwise(self.taken))
        require(is_ok, "taken", f"steps from 0 to {count - 1} that never fall", list(self.taken))
        is_timed = not self.needs_ms or len(self.needs_ms) == count
        require(is_timed, "needs_ms", f"one list for each of {count} steps", f"{len(self.needs_ms)} lists")
        is_decided = count < 2 or bool(self.taken) or bool(self.needs_ms)
        require(is_decided, "taken", "one step per scale where there are several", "none")

    def stored(self) -> dict[str, Any]:
        """As for any policy; the steps with every field of theirs."""
        steps = [[part.stored() for part in step.parts_of()] for step in self.steps]
        return {
            "policy": self.name,
            "steps": steps,
            "taken": list(self.taken),
            "needs_ms": [list(row) for row in self.needs_ms],
        }

    def changed(self) -> dict[str, Any]:
        """Fields that differ from their defaults; the steps as specs."""
        texts = tuple(step.spec for step in self.steps)
        found = {"steps": texts, "taken": self.taken, "needs_ms": self.needs_ms}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def neutral(cls) -> "StepDown":
        """No steps."""
        return cls()

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Binds every step that may be taken.

        Raises:
            FoveateError: A list of `needs_ms` does not have an entry for each scale, or steps do not go together.
        """
        count = len(schedule)
        if any(len(needs) != count for needs in self.needs_ms):
            raise FoveateError(f"step-down: needs_ms needs an entry for each of the {count} scales of this schedule")
        num_taken = min(len(self.taken), count)
        highest = (0,) * (count - num_taken) + self.taken[len(self.taken) - num_taken :]
        used = set(highest) if self.taken else set(range(len(self.steps)))
        bounds = {step: part.bind(schedule, shape) for step, part in enumerate(self.steps) if step in used}
        return BoundStepDown(self, bounds, highest)
