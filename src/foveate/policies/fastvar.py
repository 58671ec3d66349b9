"""FastVAR: at two late scales each sublayer runs only the tokens that stand out (ICCV 2025, arXiv 2503.23367).

In front of every sublayer of the blocks `first_block` to `last_block` a token is scored by the squared distance of its
hidden state to the mean of its row. The best run the sublayer; the others add what the same sublayer added, gate
included, at a reference scale, resized. Keys and values are those of the tokens that ran. The last scales do not run.

The published code (csguoh/FastVAR 34cdd65) finds its scales by the width of their grid. These widths belong to the
square schedule of 13 scales and hardly occur at other aspect ratios. Ours counts scales from the end: the same scales
there, and an effect at every ratio. `match="width"` is the published rule; where the published code crashes it is
refused. A share of tokens is rounded up, as published.
Axes: R rows, l tokens, C width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.errors import FoveateError
from foveate.core.plan import CachedFill, Keep, KeepOutputs, Resize, ScalePlan, SublayerSelection, Unit
from foveate.core.policy import Bound, Directive, Policy, require, shares_at
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.signals import Signals

PRUNED_WIDTHS = (32, 40)
"""Grid widths at which the published code prunes, in the order of `keep_first` and `keep_second`."""
SKIPPED_WIDTHS = (48, 64)
"""Grid widths that the published code leaves out."""
KEPT_GRID: Grid = (24, 24)
"""The grid whose outputs the published code keeps; it takes any 576 tokens for this grid."""


def distance_to_mean(x_RlC: Float[Tensor, "R l C"]) -> Float[Tensor, "R l"]:
    """Squared distance of each token's hidden state to the mean of its row; float32."""
    x_RlC = x_RlC.float()
    return (x_RlC - x_RlC.mean(1, keepdim=True)).square().sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where FastVAR acts on one schedule: keep ratios by scale, scales that do not run, the scale that fills."""

    keep_ratios: Mapping[int, float] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    source: int | None = None


class BoundFastVAR(Bound):
    """FastVAR on one schedule and model."""

    def __init__(self, policy: "FastVAR", schedule: ScaleSchedule, num_blocks: int) -> None:
        self.policy, self.schedule = policy, schedule
        self.places = (_by_index if policy.match == "index" else _by_width)(policy, schedule)
        self.blocks = tuple(range(policy.first_block, min(policy.last_block + 1, num_blocks)))
        self.is_pruning = bool(self.places.keep_ratios) and bool(self.blocks)
        self.fill = CachedFill(unit=Unit.SUBLAYER, source=self.places.source, resize=Resize(policy.resize))
        # What the settings ask for, also where this schedule or model has nothing of it: that is then reported.
        prunes, skips = min(policy.keep_first, policy.keep_second) < 1, policy.skip_last > 0
        self.directives = (Directive.SUBLAYERS,) * prunes + (Directive.SCALES,) * skips
        self.notes = (f"fastvar: {self._said()}",) if self.directives else ()

    def _said(self) -> str:
        """What the settings come to on this schedule."""
        parts = []
        if self.is_pruning:
            shares = [f"scale {scale} {100 * ratio:.4g} %" for scale, ratio in self.places.keep_ratios.items()]
            parts.append(
                f"blocks {self.blocks[0]} to {self.blocks[-1]} run at {' and at '.join(shares)} of the tokens, filled "
                f"from scale {self.places.source}"
            )
        if self.places.skipped:
            parts.append(f"scales from {self.places.skipped[0]} on do not run")
        nothing = "nothing to leave out on this schedule and model"
        if self.policy.match == "width" and self.places == Places():
            nothing += f": no grid is {', '.join(map(str, PRUNED_WIDTHS + SKIPPED_WIDTHS))} wide; match=index acts"
        return "; ".join(parts) or nothing

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What the sublayers add at the reference scale."""
        is_read = self.is_pruning and scale == self.places.source
        return frozenset({KeepOutputs(unit=Unit.SUBLAYER, blocks=self.blocks)}) if is_read else frozenset()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """The same count for every row; the engine scores in front of each sublayer."""
        if scale in self.places.skipped:
            return ScalePlan(runs=False), state
        if not self.is_pruning or scale not in self.places.keep_ratios:
            return ScalePlan(), state
        # Less than a rounding error of the product adds no token.
        count = math.ceil(self.places.keep_ratios[scale] * self.schedule.scales[scale].num_tokens - 1e-9)
        selection = SublayerSelection(blocks=self.blocks, count=max(count, 1), scorer=distance_to_mean)
        return ScalePlan(sublayers=(selection,), fill=self.fill), state


def _by_index(policy: "FastVAR", schedule: ScaleSchedule) -> Places:
    """Scales counted from the end of the schedule.

    Raises:
        FoveateError: The schedule is too short, or has no such reference scale in front of the pruned ones.
    """
    num_scales = len(schedule)
    end = num_scales - policy.skip_last
    require(end > 0, "skip_last", f"less than the {num_scales} scales", policy.skip_last)
    skipped = tuple(range(end, num_scales))
    ratios = {s: r for s, r in ((end - 2, policy.keep_first), (end - 1, policy.keep_second)) if r < 1}
    if not ratios:
        return Places(skipped=skipped)
    first = min(ratios)
    if first < 1:
        raise FoveateError(
            f"fastvar prunes two scales before the last {policy.skip_last} and fills from one before these, got "
            f"{num_scales} scales; lower skip_last, or set keep_first=1"
        )
    source = policy.reference_scale if policy.reference_scale >= 0 else num_scales + policy.reference_scale
    possible = f"in [{-num_scales}, {first - 1 - num_scales}], before the first pruned scale {first} of {num_scales}"
    require(0 <= source < first, "reference_scale", possible, policy.reference_scale)
    return Places(keep_ratios=ratios, skipped=skipped, source=source)


def _by_width(policy: "FastVAR", schedule: ScaleSchedule) -> Places:
    """Scales found by the width of their grid, as the published code does.

    Raises:
        FoveateError: The published code crashes on this schedule.
    """
    left_out = SKIPPED_WIDTHS[len(SKIPPED_WIDTHS) - policy.skip_last :]
    skipped = tuple(s for s, (_, width) in enumerate(schedule.grids) if width in left_out)
    wanted = dict(zip(PRUNED_WIDTHS, (policy.keep_first, policy.keep_second), strict=True))
    ratios = {s: wanted[width] for s, (_, width) in enumerate(schedule.grids) if wanted.get(width, 1) < 1}
    remedy = "the published code crashes on this schedule; use match=index"
    if skipped and skipped[0] + len(skipped) < len(schedule):
        raise FoveateError(
            f"fastvar: match=width leaves out scale {skipped[0]}, {schedule.grids[skipped[0]][1]} wide, in front of "
            f"scales that run: {remedy}"
        )
    if not ratios:
        return Places(skipped=skipped)
    first = min(ratios)
    kept = [s for s, grid in enumerate(schedule.grids[:first]) if grid == KEPT_GRID]
    if not kept:
        raise FoveateError(
            f"fastvar: match=width prunes scale {first}, {schedule.grids[first][1]} wide, but no scale before it has "
            f"the grid {KEPT_GRID} that it fills from: {remedy}"
        )
    return Places(keep_ratios=ratios, skipped=skipped, source=kept[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class FastVAR(Policy):
    """Sublayers of two scales run a share of the tokens, the last `skip_last` scales do not run.

    `keep_first` and `keep_second`, in (0, 1], belong to the last two scales that run; `reference_scale` (negative from
    the end) fills. Blocks `first_block` to `last_block` are pruned, both included; those that the model lacks do not
    count. `resize` brings the kept outputs to the grid of a pruned scale. `match`: "index" counts scales from the end;
    "width" is the published rule: the ratios belong to grids 32 and 40 wide, the last `skip_last` of the widths 48
    and 64 do not run, the grid of 24x24 tokens fills instead of `reference_scale`.
    """

    name: ClassVar[str] = "fastvar"
    dial: ClassVar[str] = "keep_first and keep_second"
    keep_first: float = 0.6
    keep_second: float = 0.5
    skip_last: int = 2
    reference_scale: int = -5
    first_block: int = 3
    last_block: int = 27
    resize: Literal["area", "bilinear", "nearest"] = "area"
    match: Literal["index", "width"] = "index"

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(0 < self.keep_first <= 1, "keep_first", "in (0, 1]", self.keep_first)
        require(0 < self.keep_second <= 1, "keep_second", "in (0, 1]", self.keep_second)
        require(self.skip_last >= 0, "skip_last", "0 or more", self.skip_last)
        require(self.first_block >= 0, "first_block", "0 or more", self.first_block)
        rule = f"first_block = {self.first_block} or more"
        require(self.last_block >= self.first_block, "last_block", rule, self.last_block)
        resizes = [resize.value for resize in Resize]
        require(self.resize in resizes, "resize", " or ".join(resizes), self.resize)
        require(self.match in ("index", "width"), "match", "index or width", self.match)
        is_known = self.match == "index" or self.skip_last <= len(SKIPPED_WIDTHS)
        require(is_known, "skip_last", f"0 to {len(SKIPPED_WIDTHS)} with match=width", self.skip_last)

    @classmethod
    def neutral(cls) -> "FastVAR":
        """All tokens and all scales."""
        return cls(keep_first=1.0, keep_second=1.0, skip_last=0)

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "FastVAR":
        """Both ratios, as given at level 1/2; `skip_last` stays."""
        del schedule, shape
        first, second = shares_at((self.keep_first, self.keep_second), level)
        return self.replace(keep_first=first, keep_second=second)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Finds the scales.

        Raises:
            FoveateError: They do not exist on this schedule, or the published rule crashes on it.
        """
        return BoundFastVAR(self, schedule, shape.num_blocks)
