"""Several policies as one: their plans are met from left to right, and what cannot go together is refused by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from foveate.core.cost import ModelShape
from foveate.core.errors import PlanConflictError
from foveate.core.plan import Keep, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Record, Signals


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed(Policy):
    """Several policies as one; plans are met from left to right."""

    name: ClassVar[str] = "composed"
    parts: tuple[Policy, ...] = ()

    def parts_of(self) -> tuple[Policy, ...]:
        """The single policies."""
        return self.parts

    @property
    def spec(self) -> str:
        """The parts, joined with `|`."""
        return "|".join(part.spec for part in self.parts)

    @classmethod
    def neutral(cls) -> "Composed":
        """The empty composition."""
        return cls()

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Binds every part and tries whether their plans go together, before anything runs.

        Raises:
            PlanConflictError: They do not; the message names both policies.
        """
        return BoundComposed(self.parts, tuple(part.bind(schedule, shape) for part in self.parts), len(schedule))


class BoundComposed(Bound):
    """Several bound policies; see `Composed`."""

    def __init__(self, parts: Sequence[Policy], bounds: Sequence[Bound], num_scales: int) -> None:
        self.parts, self.bounds = tuple(parts), tuple(bounds)
        ceilings = [self.ceilings(scale) for scale in range(num_scales)]
        self.skipped = {s: plans[0] for s, plans in enumerate(ceilings) if not any(plan.runs for plan in plans)}
        self._refuse_lost(ceilings)
        self.directives = tuple(dict.fromkeys(d for bound in bounds for d in bound.directives))
        self.notes = tuple(note for bound in bounds for note in bound.notes) + self._shared_promises()
        narrowing = [b for b in bounds if {Directive.TOKENS, Directive.BLOCKS, Directive.SUBLAYERS} & set(b.directives)]
        guided = [b for b in bounds if Directive.GUIDED_TOKENS in b.directives]
        # Two parts that leave tokens out overlap as their masks decide; one part knows its own counts.
        is_nested = len(narrowing) > 1 or (guided and len({id(bound) for bound in (*narrowing, *guided)}) > 1)
        self.is_static = all(bound.is_static for bound in bounds) and not is_nested

    @property
    def label(self) -> str:
        """The names of the parts."""
        return " | ".join(part.name for part in self.parts)

    def _shared_promises(self) -> tuple[str, ...]:
        """Directives that several parts have: a report of those that never fired cannot tell them apart."""
        notes = []
        for kind in self.directives:
            names = [p.name for p, bound in zip(self.parts, self.bounds, strict=True) if kind in bound.directives]
            if len(names) > 1:
                notes.append(f"{' and '.join(names)} both {kind.value}; one of them may have no effect")
        return tuple(notes)

    def _refuse_lost(self, ceilings: Sequence[Sequence[ScalePlan]]) -> None:
        """Refuses parts that need something of a scale which another part leaves out, or keeps something newer over it.

        Raises:
            PlanConflictError: Names the part.
        """
        last = max((scale for scale in range(len(ceilings)) if scale not in self.skipped), default=0)
        for scale in (scale for scale in self.skipped if scale < last):
            for part, bound in zip(self.parts, self.bounds, strict=True):
                if bound.record(scale) or bound.keeps(scale):
                    raise PlanConflictError(
                        f"{self.label}: {part.name} reads scale {scale}, which another part leaves out; "
                        "leave out scales at the end only, or let it read another one"
                    )
        for scale, plan in ((scale, plan) for scale, plans in enumerate(ceilings) for plan in plans):
            source = None if plan.fill is None or not plan.runs else plan.fill.source
            for other in range(scale if source is None else source + 1, scale):
                if any(isinstance(keep, KeepOutputs) for keep in self.keeps(other)):
                    raise PlanConflictError(
                        f"{self.label}: scale {scale} fills from scale {source}, but scale {other} is kept in its "
                        "place; one part must fill from what the other keeps"
                    )

    def record(self, scale: int) -> frozenset[Record]:
        """Union of what the parts record."""
        return frozenset().union(*(bound.record(scale) for bound in self.bounds))

    def keeps(self, scale: int) -> frozenset[Keep]:
        """Union of what the parts keep."""
        return frozenset().union(*(bound.keeps(scale) for bound in self.bounds))

    def start(self) -> tuple[Any, ...]:
        """One state per part."""
        return tuple(bound.start() for bound in self.bounds)

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:  # noqa: ANN401 - of parts
        """Meets the parts' plans; where one of them never runs a scale, the others are not asked."""
        if scale in self.skipped:
            return self.skipped[scale], state
        answers = [bound.plan(scale, signals, s) for bound, s in zip(self.bounds, state, strict=True)]
        return self._meet([plan for plan, _ in answers]), tuple(s for _, s in answers)

    def ceiling(self, scale: int) -> ScalePlan:
        """Meets the parts' ceilings."""
        return self._meet([bound.ceiling(scale) for bound in self.bounds])

    def ceilings(self, scale: int) -> tuple[ScalePlan, ...]:
        """Meets every choice of the parts' ceilings."""
        return tuple(self._meet(plans) for plans in product(*(bound.ceilings(scale) for bound in self.bounds)))

    def _meet(self, plans: Sequence[ScalePlan]) -> ScalePlan:
        met = ScalePlan()
        for i, plan in enumerate(plans):
            try:
                met = met.meet(plan)
            except PlanConflictError as error:
                before = " | ".join(part.name for part in self.parts[:i])
                raise PlanConflictError(f"{before} | {self.parts[i].name}: {error}") from None
        return met
