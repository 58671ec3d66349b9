"""The plan: which blocks, branches and tokens of a scale run, as data.

Plans form a lattice: token masks intersect, block sets intersect, branches intersect, weights multiply. Only two
different non-zero bases, two different fills or two narrow dtypes of one block conflict.
Axes: B images, R rows, l tokens of the scale, C width, P blocks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.selection import Selection
from foveate.core.transfer import to_device


class Unit(Enum):
    """What the engine keeps the outputs of, to fill what is skipped later."""

    BLOCK = "block"
    """What a whole block added."""
    SUBLAYER = "sublayer"
    """What a sublayer added, its gate included."""


class Resize(Enum):
    """How kept outputs come to the grid of a later scale."""

    BILINEAR = "bilinear"
    AREA = "area"
    NEAREST = "nearest"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedFill:
    """A token that skips a block or sublayer takes what that one added at a kept scale, resized to this grid.

    `source` names that scale; None is the latest kept one. The bound says what is kept (`Bound.keeps`).
    """

    unit: Unit = Unit.BLOCK
    source: int | None = None
    resize: Resize = Resize.BILINEAR


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepOutputs:
    """The engine keeps what some blocks (None: all), or their sublayers, added to each token at a scale.

    Costs one tensor per unit in the compute dtype; inside the memory bound. A later scale that keeps replaces it.
    """

    unit: Unit = Unit.BLOCK
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepDifference:
    """The engine keeps cond - uncond of a scale that ran both branches; costs one map of head inputs or outputs."""


Keep = KeepOutputs | KeepDifference
"""What the engine itself keeps of a scale for later fills."""


class Base(Enum):
    """What the residual holds where no token ran."""

    ZERO = "zero"
    PREVIOUS = "previous"
    """The residual of the latest scale that ran, repeated to the new grid."""
    NEAREST = "nearest"
    """The code of the nearest token that ran, in grid steps; ties by index."""
    COPY = "copy"
    """The code of the token that `source_Bl` names; zero if that one did not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A base: a token that did not run draws from the spread logits of those around it, with its own random numbers.

    Its bits are softened and scaled by a confidence that is measured on the tokens that ran (`engine.spread`). Bits
    only: the engine refuses it for codebooks.

    Attributes:
        sigma: Distance, in grid steps, at which a neighbour's weight has fallen to .61; above 0.
        likeness: The same for the difference of the scale's input, in units of its spread over the map; above 0.
        softness: Temperature of a bit that was not computed; towards 0 it is drawn hard. Above 0.
    """

    sigma: float = 1.0
    likeness: float = 0.3
    softness: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedDifference:
    """Where the unconditional branch does not run, a kept cond - uncond guides, resized bilinearly, times `weight`."""

    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpreadDifference:
    """Where the unconditional branch does not run, cond - uncond of the tokens around guides; zero where there is none.

    Times a confidence that is measured on the tokens that ran in both branches; `sigma` and `likeness` as in `Spread`.
    """

    sigma: float = 1.0
    likeness: float = 0.5


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
class SublayerSelection:
    """In front of each sublayer of some blocks, only the `count` best tokens of a row run it; the others take the fill.

    `scorer` maps hidden states (R, l, C) to scores (R, l), a pure function of each row by itself. It ranks the tokens
    that run the block; ties go by index. Keys and values are those of the tokens that ran self-attention.
    """

    blocks: tuple[int, ...]
    count: int
    scorer: Callable[[Float[Tensor, "R l C"]], Float[Tensor, "R l"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDtype:
    """Blocks `first` up to `end` (None: the last) run in a narrower dtype; the hidden states between stay float32."""

    dtype: torch.dtype
    first: int = 0
    end: int | None = None

    def covers(self, block: int) -> bool:
        """Whether a block is among them."""
        return self.first <= block and (self.end is None or block < self.end)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScalePlan:
    """What one scale runs; the defaults run everything. In maps, one entry speaks for all images.

    Attributes:
        runs: Whether the scale runs at all.
        unconditional: Per image, whether that branch runs; None for all. Once stopped it never returns.
        guided_B: As `unconditional`, decided on the device: the engine reads it with the counts.
        unconditional_tokens: Which of the kept tokens the unconditional branch runs; the others are guided by the
            `difference`, or not at all.
        difference: What guides where the unconditional branch does not run; None is the conditional branch alone.
        selections: The tokens that run. The others run no block, write no keys and values and commit the base.
        depths: The blocks that each token runs.
        sublayers: The tokens that run single sublayers.
        fill: What a token takes at a block or sublayer that it skips; None is nothing.
        base: What the residual holds where no token ran.
        source_Bl: For `Base.COPY`, the token that each token copies.
        weight_Bl: Multiplies the looked-up codes; (1 or B, 1 or l).
        base_weight_Bl: Multiplies the base; (1 or B, 1 or l).
        evict: Scales whose keys and values go after this one.
        dtypes: Blocks that run in a narrower dtype.
    """

    runs: bool = True
    unconditional: tuple[bool, ...] | None = None
    guided_B: Bool[Tensor, " B"] | None = None
    unconditional_tokens: tuple[Selection, ...] = ()
    difference: SpreadDifference | CachedDifference | None = None
    selections: tuple[Selection, ...] = ()
    depths: tuple[DepthMap, ...] = ()
    sublayers: tuple[SublayerSelection, ...] = ()
    fill: CachedFill | None = None
    base: Base | Spread = Base.ZERO
    source_Bl: Int[Tensor, "#B l"] | None = None
    weight_Bl: Float[Tensor, "#B #l"] | None = None
    base_weight_Bl: Float[Tensor, "#B #l"] | None = None
    evict: tuple[int, ...] = ()
    dtypes: tuple[BlockDtype, ...] = ()

    def keep(self, num_images: int, num_tokens: int) -> Bool[Tensor, "B l"] | None:
        """The tokens that run, or None if all do."""
        return narrowed(self.selections, None, num_images, num_tokens)

    def active(self, block: int) -> Bool[Tensor, "B l"] | None:
        """The tokens that run a block, before selections, or None if all do."""
        active_Bl: Tensor | None = None
        for depth in self.depths:
            mask_Bl = depth.active(block)
            active_Bl = mask_Bl if active_Bl is None else active_Bl & mask_Bl
        return active_Bl

    def sublayer_count(self, block: int, num_tokens: int) -> int:
        """How many of so many tokens that run a block run each of its sublayers."""
        return min([num_tokens, *(part.count for part in self.sublayers if block in part.blocks)])

    def dtype_of(self, block: int) -> torch.dtype | None:
        """The narrower dtype of a block, or None."""
        return next((part.dtype for part in self.dtypes if part.covers(block)), None)

    @property
    def stops_branch(self) -> bool:
        """Whether it leaves out the unconditional branch, or tokens of it, whatever the content."""
        return self.unconditional is not None or bool(self.unconditional_tokens)

    def with_branches(self, unconditional: Sequence[bool]) -> "ScalePlan":
        """The same plan with what was read of `guided_B` among `unconditional`."""
        return replace(self, unconditional=_both(self.unconditional, tuple(unconditional)), guided_B=None)

    def on(self, device: torch.device) -> "ScalePlan":
        """The same plan with its tensors on a device."""

        def moved(map_Bl: Tensor | None) -> Tensor | None:
            return None if map_Bl is None else to_device(map_Bl, device)

        return replace(
            self,
            selections=tuple(part.on(device) for part in self.selections),
            unconditional_tokens=tuple(part.on(device) for part in self.unconditional_tokens),
            depths=tuple(replace(d, depth_Bl=to_device(d.depth_Bl, device)) for d in self.depths),
            source_Bl=moved(self.source_Bl),
            weight_Bl=moved(self.weight_Bl),
            base_weight_Bl=moved(self.base_weight_Bl),
            guided_B=moved(self.guided_B),
        )

    def meet(self, other: "ScalePlan") -> "ScalePlan":
        """What both plans let run.

        Raises:
            PlanConflictError: Two different fills, two different non-zero bases, or two dtypes for one block.
        """
        if self._is_filled and other._is_filled and self.fill != other.fill:
            raise PlanConflictError(f"two fills, {_said(self.fill)} and {_said(other.fill)}; keep one")
        bases = {self.base, other.base} - {Base.ZERO}
        if len(bases) > 1:
            said = " and ".join(sorted(said_base(base) for base in bases))
            raise PlanConflictError(f"two base maps for dropped tokens, {said}; keep one")
        if self.source_Bl is not None and other.source_Bl is not None:
            raise PlanConflictError("two maps of tokens to copy from; keep one")
        _refuse_two_dtypes(self.dtypes, other.dtypes)
        return ScalePlan(
            runs=self.runs and other.runs,
            unconditional=_both(self.unconditional, other.unconditional),
            guided_B=_meet(torch.logical_and, self.guided_B, other.guided_B),
            unconditional_tokens=self.unconditional_tokens + other.unconditional_tokens,
            difference=_cheaper_difference(self, other),
            selections=self.selections + other.selections,
            depths=self.depths + other.depths,
            sublayers=self.sublayers + other.sublayers,
            fill=self.fill if self._is_filled else other.fill,
            base=bases.pop() if bases else Base.ZERO,
            source_Bl=other.source_Bl if self.source_Bl is None else self.source_Bl,
            weight_Bl=_meet(torch.mul, self.weight_Bl, other.weight_Bl),
            base_weight_Bl=_meet(torch.mul, self.base_weight_Bl, other.base_weight_Bl),
            evict=tuple(sorted({*self.evict, *other.evict})),
            dtypes=self.dtypes + other.dtypes,
        )

    @property
    def _is_filled(self) -> bool:
        return bool(self.depths or self.sublayers)


def narrowed(
    selections: Sequence[Selection], survivors_Bl: Bool[Tensor, "B l"] | None, num_images: int, num_tokens: int
) -> Bool[Tensor, "B l"] | None:
    """What selections leave, from left to right, of all tokens or of some; None if there is no selection at all."""
    if not selections:
        return survivors_Bl
    if survivors_Bl is None:
        device = selections[0].token_map.device
        survivors_Bl = torch.ones(num_images, num_tokens, dtype=torch.bool, device=device)
    for selection in selections:
        survivors_Bl = selection.narrow(survivors_Bl)
    return survivors_Bl


def said_base(base: Base | Spread) -> str:
    """How errors name a base."""
    return base.value if isinstance(base, Base) else f"spread logits ({base.sigma}, {base.likeness}, {base.softness})"


def _said(fill: CachedFill | None) -> str:
    if fill is None:
        return "nothing"
    scale = "the latest scale" if fill.source is None else f"scale {fill.source}"
    return f"the output of each {fill.unit.value} at {scale} ({fill.resize.value})"


def _refuse_two_dtypes(ours: Sequence[BlockDtype], theirs: Sequence[BlockDtype]) -> None:
    for a in ours:
        for b in theirs:
            overlaps = (b.end is None or a.first < b.end) and (a.end is None or b.first < a.end)
            if overlaps and a.dtype != b.dtype:
                raise PlanConflictError(f"two dtypes for one block, {a.dtype} and {b.dtype}; keep one")


def _cheaper_difference(a: ScalePlan, b: ScalePlan) -> SpreadDifference | CachedDifference | None:
    """The cheaper of two rules for the branch: both branches > spread > cached difference > conditional branch alone.

    Raises:
        PlanConflictError: They spread the difference in two ways.
    """
    # A branch that stops by content (`guided_B`) leaves a kept difference of zero behind, so it need not say more.
    if not (a.stops_branch and b.stops_branch):
        return a.difference if a.stops_branch else b.difference
    if a.difference is None or b.difference is None:
        return None
    cached = [part for part in (a.difference, b.difference) if isinstance(part, CachedDifference)]
    if cached:
        return CachedDifference(weight=math.prod(part.weight for part in cached))
    if a.difference != b.difference:
        raise PlanConflictError(f"two ways to spread the difference, {a.difference} and {b.difference}; keep one")
    return a.difference


def _both(a: tuple[bool, ...] | None, b: tuple[bool, ...] | None) -> tuple[bool, ...] | None:
    if a is None or b is None:
        return b if a is None else a
    size = max(len(a), len(b))
    return tuple(x and y for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True))


def _meet(rule: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return rule(a, b)
