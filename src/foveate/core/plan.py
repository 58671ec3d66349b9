"""The plan: which part of the cube (block x branch x token) of a scale runs, as data; and the policy that decides.

Plans form a lattice: token masks intersect, block sets intersect, branches intersect, weights multiply. Only two
different non-zero base maps or two different fills conflict.
Axes: B images, l tokens of the scale, P blocks.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import yaml
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.atomic import write_text
from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError, PlanConflictError
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signal, Signals
from foveate.core.transfer import to_device

P = TypeVar("P", bound="Policy")


class Fill(Enum):
    """What a token holds behind a block that it skips."""

    IDENTITY = "identity"
    CACHED = "cached"
    """Its hidden state plus the same block's delta at the latest recorded scale, resized."""


class Base(Enum):
    """What the residual holds where no token ran."""

    ZERO = "zero"
    PREVIOUS = "previous"
    """The residual of the latest scale that ran, repeated to the new grid."""


class Rule(Enum):
    """How many tokens a score keeps."""

    MASS = "mass"
    """The fewest tokens that hold a share of the total score, and all that tie with the last of them."""
    COUNT = "count"
    """A share of the tokens, rounded up; ties by index."""


class Directive(Enum):
    """What a policy promises to reduce; a promise that never came true is reported."""

    SCALES = "skip scales"
    BRANCH = "stop the unconditional branch"
    TOKENS = "drop tokens"
    BLOCKS = "skip blocks"


def keep_by_mass(score_Bl: Float[Tensor, "B l"], share: float) -> Bool[Tensor, "B l"]:
    """Keeps the fewest highest scores that reach `share` of each image's sum, and every score that ties with the last.

    Sums are float64. A share of 1 and a sum of zero keep everything. Scores must not be negative.
    """
    if share >= 1:
        return torch.ones_like(score_Bl, dtype=torch.bool)
    score_Bl = score_Bl.double()
    descending_Bl = score_Bl.sort(dim=-1, descending=True).values
    cumulative_Bl = descending_Bl.cumsum(-1)
    total_B1 = cumulative_Bl[:, -1:]
    last_B1 = (cumulative_Bl < share * total_B1).sum(-1, keepdim=True)
    return (score_Bl >= descending_Bl.gather(-1, last_B1)) | (total_B1 <= 0)


def keep_by_count(score_Bl: Float[Tensor, "B l"], count: int | Int[Tensor, "B 1"]) -> Bool[Tensor, "B l"]:
    """Keeps the `count` highest scores of each image, equal scores by index; never waits for the device."""
    order_Bl = score_Bl.sort(dim=-1, descending=True, stable=True).indices
    is_high_Bl = (torch.arange(score_Bl.shape[-1], device=score_Bl.device) < count).expand_as(order_Bl)
    return torch.zeros_like(score_Bl, dtype=torch.bool).scatter_(-1, order_Bl, is_high_Bl)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSelection:
    """One score per token and how much of it to keep; both branches keep the same tokens."""

    score_Bl: Float[Tensor, "B l"]
    share: float
    rule: Rule

    def count(self, num_survivors: int) -> int | None:
        """How many of so many survivors stay, or None where the content decides."""
        if self.rule is Rule.COUNT:
            return min(num_survivors, math.ceil(self.share * num_survivors - 1e-9))
        return num_survivors if self.share >= 1 else None

    def narrow(self, survivors_Bl: Bool[Tensor, "B l"]) -> Bool[Tensor, "B l"]:
        """Ranks the survivors of earlier selections and returns those that stay; never waits for the device."""
        score_Bl = self.score_Bl.expand(survivors_Bl.shape)
        if self.rule is Rule.MASS:
            return survivors_Bl & keep_by_mass(score_Bl.masked_fill(~survivors_Bl, 0.0), self.share)
        ranked_Bl = score_Bl.masked_fill(~survivors_Bl, -torch.inf)
        count_B1 = (self.share * survivors_Bl.sum(-1, keepdim=True).double() - 1e-9).ceil().long()
        return survivors_Bl & keep_by_count(ranked_Bl, count_B1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DepthMap:
    """A depth per token: a token of depth D runs the first D blocks of `order`.

    `counts` says for every place in the order how many tokens of each image run that block; None where the content
    decides.
    """

    depth_Bl: Int[Tensor, "B l"]
    order: tuple[int, ...]
    counts: tuple[int, ...] | None = None

    def active(self, block: int) -> Bool[Tensor, "B l"]:
        """The tokens that run a block."""
        return self.depth_Bl > self.order.index(block)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScalePlan:
    """What one scale runs; the defaults run everything.

    `unconditional` says per image whether the branch runs (one entry speaks for all images), None for all. A token
    outside the selections runs no block, writes no keys and values and commits the base. `weight_Bl` multiplies the
    looked-up codes. `guided_B` is as `unconditional`, decided on the device: the engine reads it with the counts.
    """

    runs: bool = True
    unconditional: tuple[bool, ...] | None = None
    guided_B: Bool[Tensor, " B"] | None = None
    selections: tuple[TokenSelection, ...] = ()
    depths: tuple[DepthMap, ...] = ()
    fill: Fill = Fill.IDENTITY
    weight_Bl: Float[Tensor, "B l"] | None = None
    base: Base = Base.ZERO

    def keep(self, num_images: int, num_tokens: int) -> Bool[Tensor, "B l"] | None:
        """The tokens that run, or None if all do."""
        if not self.selections:
            return None
        device = self.selections[0].score_Bl.device
        keep_Bl = torch.ones(num_images, num_tokens, dtype=torch.bool, device=device)
        for selection in self.selections:
            keep_Bl = selection.narrow(keep_Bl)
        return keep_Bl

    def active(self, block: int) -> Bool[Tensor, "B l"] | None:
        """The tokens that run a block, before selections, or None if all do."""
        active_Bl: Tensor | None = None
        for depth in self.depths:
            mask_Bl = depth.active(block)
            active_Bl = mask_Bl if active_Bl is None else active_Bl & mask_Bl
        return active_Bl

    def with_branches(self, unconditional: Sequence[bool]) -> "ScalePlan":
        """The same plan with what was read of `guided_B` among `unconditional`."""
        return replace(self, unconditional=_both(self.unconditional, tuple(unconditional)), guided_B=None)

    def on(self, device: torch.device) -> "ScalePlan":
        """The same plan with its tensors on a device."""
        return replace(
            self,
            selections=tuple(replace(s, score_Bl=to_device(s.score_Bl, device)) for s in self.selections),
            depths=tuple(replace(d, depth_Bl=to_device(d.depth_Bl, device)) for d in self.depths),
            weight_Bl=None if self.weight_Bl is None else to_device(self.weight_Bl, device),
            guided_B=None if self.guided_B is None else to_device(self.guided_B, device),
        )

    def meet(self, other: "ScalePlan") -> "ScalePlan":
        """What both plans let run.

        Raises:
            PlanConflictError: Two different fills, or two different non-zero bases.
        """
        if self.depths and other.depths and self.fill is not other.fill:
            raise PlanConflictError(f"two fills for skipped blocks, {self.fill.value} and {other.fill.value}; keep one")
        bases = {self.base, other.base} - {Base.ZERO}
        if len(bases) > 1:
            raise PlanConflictError(f"two base maps for dropped tokens, {sorted(b.value for b in bases)}; keep one")
        return ScalePlan(
            runs=self.runs and other.runs,
            unconditional=_both(self.unconditional, other.unconditional),
            guided_B=_meet(torch.logical_and, self.guided_B, other.guided_B),
            selections=self.selections + other.selections,
            depths=self.depths + other.depths,
            fill=self.fill if self.depths else other.fill,
            weight_Bl=_meet(torch.mul, self.weight_Bl, other.weight_Bl),
            base=bases.pop() if bases else Base.ZERO,
        )


def _both(a: tuple[bool, ...] | None, b: tuple[bool, ...] | None) -> tuple[bool, ...] | None:
    if a is None or b is None:
        return b if a is None else a
    size = max(len(a), len(b))
    return tuple(x and y for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True))


def _meet(rule: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return rule(a, b)


class Bound(ABC):
    """A policy bound to one schedule and one model shape; it holds no state of a request."""

    directives: tuple[Directive, ...] = ()
    """What it means to reduce on this schedule."""
    notes: tuple[str, ...] = ()
    """What the settings imply on this schedule, for people."""
    is_static: bool = True
    """Whether the counts (not necessarily the tokens) are known before the run."""

    def record(self, scale: int) -> frozenset[Signal]:
        """Signals to record while a scale runs."""
        return frozenset()

    def start(self) -> Any:
        """State before the first scale; immutable, owned by the request."""
        return None

    @abstractmethod
    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Plans a scale, given what the latest scale that ran left behind (None before scale 0)."""

    def ceiling(self, scale: int) -> ScalePlan:
        """The most that `plan` can return for one image: same counts if static, an upper bound otherwise.

        Tokens of smaller index count as the ones that run most, so that ceilings of several policies nest.
        """
        return self.plan(scale, None, self.start())[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(ABC):
    """A method: frozen settings, checked at construction, that decide how much of a model runs."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Fixes everything that follows from the schedule and the model's shape, once per request."""

    @classmethod
    @abstractmethod
    def neutral(cls) -> "Policy":
        """The setting that changes nothing, bit for bit."""

    def __or__(self, other: "Policy") -> "Policy":
        """Both policies as one; each lets run at most what it would alone."""
        return Composed(parts=(*self.parts_of(), *other.parts_of()))

    def parts_of(self) -> tuple["Policy", ...]:
        """The single policies of a composition, itself otherwise."""
        return (self,)

    def settings(self) -> dict[str, Any]:
        """Field names and values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def spec(self) -> str:
        """The policy as one line: name, then the fields that differ from their defaults."""
        changed = [
            f"{f.name}={_plain(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with any field, defaults included."""
        text = "|".join(f"{part.name}:{sorted(part.settings().items())}" for part in self.parts_of())
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self, path: str | Path) -> None:
        """Writes the policy with every field, so that later defaults cannot change it."""
        parts = [{"policy": part.name, **part.settings()} for part in self.parts_of()]
        write_text(path, yaml.safe_dump(parts if len(parts) > 1 else parts[0], sort_keys=False))

    def replace(self: P, **changes: Any) -> P:
        """The same policy with some fields changed and checked again."""
        return replace(self, **changes)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def require(ok: bool, name: str, rule: str, value: object) -> None:
    """Checks one field of a policy.

    Raises:
        FoveateError: `name must be rule, got value`.
    """
    if not ok:
        raise FoveateError(f"{name} must be {rule}, got {value}")


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

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> "Bound":
        """Binds every part and tries whether their plans go together, before anything runs.

        Raises:
            PlanConflictError: They do not; the message names both policies.
        """
        bounds = tuple(part.bind(schedule, shape) for part in self.parts)
        bound = BoundComposed(self.parts, bounds)
        for scale in range(len(schedule)):
            bound.ceiling(scale)
        return bound


class BoundComposed(Bound):
    """Several bound policies; see `Composed`."""

    def __init__(self, parts: Sequence[Policy], bounds: Sequence[Bound]) -> None:
        self.parts, self.bounds = tuple(parts), tuple(bounds)
        self.directives = tuple(dict.fromkeys(d for bound in bounds for d in bound.directives))
        self.notes = tuple(note for bound in bounds for note in bound.notes) + self._shared_promises()
        narrowing = [b for b in bounds if {Directive.TOKENS, Directive.BLOCKS} & set(b.directives)]
        self.is_static = all(bound.is_static for bound in bounds) and len(narrowing) <= 1

    def _shared_promises(self) -> tuple[str, ...]:
        """Kinds of saving that several parts promise: a report of unfired promises cannot tell them apart."""
        notes = []
        for kind in self.directives:
            names = [p.name for p, bound in zip(self.parts, self.bounds, strict=True) if kind in bound.directives]
            if len(names) > 1:
                notes.append(f"{' and '.join(names)} both promise to {kind.value}; one of them may have done nothing")
        return tuple(notes)

    def record(self, scale: int) -> frozenset[Signal]:
        """Union of what the parts record."""
        return frozenset().union(*(bound.record(scale) for bound in self.bounds))

    def start(self) -> tuple[Any, ...]:
        """One state per part."""
        return tuple(bound.start() for bound in self.bounds)

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Meets the parts' plans."""
        answers = [bound.plan(scale, signals, s) for bound, s in zip(self.bounds, state, strict=True)]
        return self._meet([plan for plan, _ in answers]), tuple(s for _, s in answers)

    def ceiling(self, scale: int) -> ScalePlan:
        """Meets the parts' ceilings."""
        return self._meet([bound.ceiling(scale) for bound in self.bounds])

    def _meet(self, plans: Sequence[ScalePlan]) -> ScalePlan:
        met = ScalePlan()
        for i, plan in enumerate(plans):
            try:
                met = met.meet(plan)
            except PlanConflictError as error:
                before = " | ".join(part.name for part in self.parts[:i])
                raise PlanConflictError(f"{before} | {self.parts[i].name}: {error}") from None
        return met
