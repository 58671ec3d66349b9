"""What several policies share: pure functions, and a bound that keeps the tokens a score ranks highest.

Axes: B images, l tokens of the previous scale, m tokens of the coming one, C width, (y, x) the coming grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.plan import Base, ScalePlan
from foveate.core.policy import Bound, Directive, require
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.selection import Rule, TokenSelection
from foveate.core.signals import Record, Signals


def bit_reversal_order(num_blocks: int) -> tuple[int, ...]:
    """Blocks in bit-reversal order: reversed over ceil(log2 P) bits, indices beyond the last block left out."""
    bits = max(num_blocks - 1, 0).bit_length()
    reversed_indices = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return tuple(i for i in reversed_indices if i < num_blocks)


def block_at(block: int, num_blocks: int) -> int:
    """The index of a block of this model; negative ones count from the end.

    Raises:
        FoveateError: There is no such block.
    """
    require(-num_blocks <= block < num_blocks, "block", f"in [{-num_blocks}, {num_blocks - 1}] of this model", block)
    return block % num_blocks


def resized_scores(score_Bl: Float[Tensor, "B l"], source: Grid, grid: Grid) -> Float[Tensor, "B m"]:
    """Scores on the coming grid, bilinearly; float64, so that rounding does not reorder them."""
    score_B1hw = score_Bl.double().unflatten(-1, source)[:, None]
    return F.interpolate(score_B1hw, size=grid, mode="bilinear", align_corners=False).flatten(1)


def require_kept(keep_ratio: float, num_scales: int, fill: str) -> None:
    """Checks the settings of a share that is kept.

    Raises:
        FoveateError: Names the one that is out of range.
    """
    require(0 < keep_ratio <= 1, "keep_ratio", "in (0, 1]", keep_ratio)
    require(num_scales >= 0, "num_scales", "0 or more", num_scales)
    require(fill in ("base", "zero"), "fill", "base or zero", fill)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptShare:
    """How many tokens of which scales a score keeps, and what the others commit; `label` names the policy in errors."""

    label: str
    keep_ratio: float
    num_scales: int
    fill: Literal["base", "zero"]


class BoundByScore(Bound):
    """Keeps a share of the tokens of the last scales: the highest scores of a signal of the scale before."""

    def __init__(
        self,
        kept: KeptShare,
        schedule: ScaleSchedule,
        signal: Record,
        score: Callable[[Tensor], Float[Tensor, "B l"]],
    ) -> None:
        """Fixes the scales.

        Args:
            kept: What is kept of which scales.
            schedule: Of the request.
            signal: What is recorded of the scale before each of them.
            score: From the signal's value to scores of 0 or more, 0 for tokens that did not run there; pure.
        """
        self.kept, self.schedule, self.signal, self.score = kept, schedule, signal, score
        self.first = max(len(schedule) - kept.num_scales, 1)
        self.is_on = kept.keep_ratio < 1 and self.first < len(schedule)
        self.directives = (Directive.TOKENS,) if self.is_on else ()

    @property
    def label(self) -> str:
        """The name of the policy."""
        return self.kept.label

    def record(self, scale: int) -> frozenset[Record]:
        """The signal, at every scale that a pruned one follows."""
        is_read = self.is_on and self.first - 1 <= scale < len(self.schedule) - 1
        return frozenset({self.signal}) if is_read else frozenset()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Keeps the tokens with the highest scores."""
        if not self.is_on or scale < self.first:
            return ScalePlan(), state
        if signals is None:
            raise PlanConflictError(f"{self.label} plans scale {scale} from the scale before, and none ran")
        if signals.scale < scale - 1:
            # Another part of a composition has ended the image: it may leave out scales at the end only.
            return ScalePlan(), state
        score_Bl = self.score(signals[self.signal])
        return self._keep(resized_scores(score_Bl, signals.grid, self.schedule.grids[scale])), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens, the first ones."""
        if not self.is_on or scale < self.first:
            return ScalePlan()
        return self._keep(-torch.arange(self.schedule.scales[scale].num_tokens, device="cpu")[None].double())

    def _keep(self, score_Bl: Float[Tensor, "B m"]) -> ScalePlan:
        base = Base.PREVIOUS if self.kept.fill == "base" else Base.ZERO
        selection = TokenSelection(score_Bl=score_Bl, share=self.kept.keep_ratio, rule=Rule.COUNT)
        return ScalePlan(selections=(selection,), base=base)
