"""A policy: frozen settings that decide how much of a model runs; bound to a schedule, it plans every scale."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from foveate.core.atomic import write_text
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.fields import plain, written
from foveate.core.plan import Keep, ScalePlan, Spread
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Record, Signals

P = TypeVar("P", bound="Policy")

_LEAST_SHARE = 1e-4


class Directive(Enum):
    """What a policy says it reduces; what never happened is reported as a policy with no effect."""

    SCALES = "skip scales"
    BRANCH = "stop the unconditional branch"
    GUIDED_TOKENS = "run the unconditional branch on fewer tokens"
    TOKENS = "drop tokens"
    BLOCKS = "skip blocks"
    SUBLAYERS = "skip sublayers"
    KEYS = "evict keys"
    DTYPE = "run blocks in a narrower dtype"


class Bound(ABC):
    """A policy bound to one schedule and one model shape; it holds no state of a request."""

    directives: tuple[Directive, ...] = ()
    """What it means to reduce on this schedule."""
    notes: tuple[str, ...] = ()
    """What the settings imply on this schedule, for people."""
    is_static: bool = True
    """Whether the counts (not necessarily the tokens) are known before the run."""

    @property
    def label(self) -> str:
        """The name used in errors."""
        return type(self).__name__.removeprefix("Bound")

    def record(self, scale: int) -> frozenset[Record]:
        """Signals to record while a scale runs; the plan of the next scale that runs receives them."""
        return frozenset()

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What the engine itself keeps of a scale for later fills."""
        return frozenset()

    def start(self) -> Any:  # noqa: ANN401 - a policy's state is its own business
        """State before the first scale; immutable, owned by the request."""
        return None

    @abstractmethod
    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:  # noqa: ANN401 - as above
        """Plans a scale, given what the latest scale that ran left behind (None before scale 0)."""

    def ceiling(self, scale: int) -> ScalePlan:
        """Upper bound of what `plan` can return for one image; exact counts if static.

        Tokens of smaller index count as the ones that run most, so that ceilings of several policies nest.
        """
        return self.plan(scale, None, self.start())[0]

    def ceilings(self, scale: int) -> tuple[ScalePlan, ...]:
        """Ceilings of all plans that the run may still choose between, the one of `ceiling` first."""
        return (self.ceiling(scale),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(ABC):
    """A method: frozen settings, checked at construction, that decide how much of a model runs.

    `revision` grows when the same settings come to mean something else. `dial` names what `at_level` sets; it is empty
    where no setting has a compute that is known before the run. A coarse dial counts whole scales or blocks.
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 0
    dial: ClassVar[str] = ""
    is_dial_coarse: ClassVar[bool] = False

    @abstractmethod
    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Fixes everything that follows from the schedule and the model's shape, once per request."""

    @classmethod
    @abstractmethod
    def neutral(cls) -> "Policy":
        """The setting that changes nothing, bit for bit."""

    def at_level(self: P, level: float, schedule: ScaleSchedule, shape: ModelShape) -> P:
        """The same policy with its dial at a level; never more compute at a lower one.

        Unless a policy says otherwise, its dial is a share in (0, 1], and the level is that share to four places.

        Args:
            level: In [0, 1]: 0 leaves out as much as the dial can, 1 as little.
            schedule: What the policy will be bound to.
            shape: As well.

        Raises:
            FoveateError: The policy has no dial.
        """
        del schedule, shape
        if not self.dial:
            raise FoveateError(f"{self.name} has no setting whose compute is known before the run")
        return self.replace(**{self.dial: share_at(level)})

    def __or__(self, other: "Policy") -> "Policy":
        """Both policies as one; each lets run at most what it would alone."""
        from foveate.core.composition import Composed  # noqa: PLC0415 - a composition is a policy itself

        return Composed(parts=(*self.parts_of(), *other.parts_of()))

    def parts_of(self) -> tuple["Policy", ...]:
        """The single policies of a composition, itself otherwise."""
        return (self,)

    def settings(self) -> dict[str, Any]:
        """Field names and values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def stored(self) -> dict[str, Any]:
        """Name and every field as JSON and YAML have them."""
        return {"policy": self.name, **{name: plain(value) for name, value in self.settings().items()}}

    def changed(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def spec(self) -> str:
        """The policy as one line: name, then the fields that differ from their defaults."""
        given = [f"{name}={written(value)}" for name, value in self.changed().items()]
        return self.name + (":" + ",".join(given) if given else "")

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over the fields that differ from their defaults and the revision.

        A new field with a neutral default changes no old fingerprint.
        """
        changed = [sorted((name, plain(value)) for name, value in part.changed().items()) for part in self.parts_of()]
        text = "|".join(f"{part.name}:{part.revision}:{c}" for part, c in zip(self.parts_of(), changed, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes the policy with every field, so that later defaults cannot change it.

        Args:
            path: A file that ends in .yaml or .yml; an existing one is replaced.
            provenance: Where the setting comes from, as plain data (`foveate.policies.provenance`); decides nothing.
        """
        parts, said = [part.stored() for part in self.parts_of()], {} if provenance is None else dict(provenance)
        if len(parts) == 1:
            content: Any = parts[0] | ({"provenance": said} if said else {})
        else:
            content = parts + ([{"provenance": said}] if said else [])
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def replace(self: P, **changes: Any) -> P:
        """The same policy with some fields changed and checked again."""
        return replace(self, **changes)


def share_at(level: float) -> float:
    """A share in (0, 1] at a level of a dial, to four places, as a spec shows it."""
    return max(round(level, 4), _LEAST_SHARE)


def shares_at(shares: Sequence[float], level: float) -> tuple[float, ...]:
    """Several shares at one level: towards 1 above the level 1/2, where they are as given, and towards 0 below."""
    if level >= 1 / 2:
        return tuple(share_at(share + (1 - share) * (2 * level - 1)) for share in shares)
    return tuple(share_at(share * 2 * level) for share in shares)


def refuse_spread(bound: Bound, num_scales: int, shape: ModelShape) -> None:
    """Refuses a policy that may spread logits where a token holds an id: nobody has shown how.

    Raises:
        PlanConflictError: Names the policy.
    """
    plans = [plan for scale in range(num_scales) for plan in bound.ceilings(scale)]
    if not shape.draws_bits and any(isinstance(plan.base, Spread) for plan in plans):
        raise PlanConflictError(
            f"{bound.label}: logits are spread bit by bit, but a token of this model holds an id of a codebook; "
            "take another fill, or leave this policy out"
        )


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Checks one field of a policy.

    Raises:
        FoveateError: `name must be rule, got value`.
    """
    if not ok:
        raise FoveateError(f"{name} must be {rule}, got {value}")
