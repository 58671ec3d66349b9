"""BlocksPerScale: each of the last scales runs its own share of the blocks, the same for every token.

Blocks go in bit-reversal order, as in DepthVAR; a skipped block adds what it added at the latest scale, or nothing.
VARiant (arXiv 2511.16546) runs such depths on weights that were trained for them; this is the rule on weights as they
are. `uniform-depth` is the case of equal shares.
Axes: P blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch

from foveate.core.cost import ModelShape
from foveate.core.plan import CachedFill, DepthMap, Keep, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require, shares_at
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals
from foveate.policies.scores import bit_reversal_order

Fill = Literal["cached", "identity"]


def depth_of(keep_ratio: float, num_blocks: int) -> int:
    """Blocks that a share stands for, at least one."""
    return max(1, round(keep_ratio * num_blocks))


def require_fill(fill: str) -> None:
    """Checks what a skipped block adds.

    Raises:
        FoveateError: It is neither cached nor identity.
    """
    require(fill in ("cached", "identity"), "fill", "cached or identity", fill)


class BoundBlocksPerScale(Bound):
    """One depth per scale for all its tokens; the scales are the last ones, and the first scale runs all blocks."""

    def __init__(self, keep_ratios: Sequence[float], fill: Fill, schedule: ScaleSchedule, num_blocks: int) -> None:
        self.schedule, self.fill = schedule, CachedFill() if fill == "cached" else None
        self.order = bit_reversal_order(num_blocks)
        count = min(len(keep_ratios), len(schedule) - 1)
        later = [depth_of(ratio, num_blocks) for ratio in keep_ratios[len(keep_ratios) - count :]]
        depths = [num_blocks] * (len(schedule) - count) + later
        self.depths = {scale: depth for scale, depth in enumerate(depths) if depth < num_blocks}
        self.directives = (Directive.BLOCKS,) if self.depths else ()

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What blocks added, from in front of the first shallow scale on, if skipped ones are filled with it."""
        is_read = bool(self.depths) and self.fill is not None and min(self.depths) - 1 <= scale < max(self.depths)
        return frozenset({KeepOutputs()}) if is_read else frozenset()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """One depth for all tokens of the scale."""
        if scale not in self.depths:
            return ScalePlan(), state
        depth, num_tokens = self.depths[scale], self.schedule.scales[scale].num_tokens
        depth_Bl = torch.full((1, num_tokens), depth, dtype=torch.long, device="cpu")
        counts = tuple(num_tokens * (place < depth) for place in range(len(self.order)))
        return ScalePlan(depths=(DepthMap(depth_Bl=depth_Bl, order=self.order, counts=counts),), fill=self.fill), state


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksPerScale(Policy):
    """Runs a share of the blocks, in (0, 1], on each of the last scales: the last entry belongs to the last scale.

    Where the schedule has fewer scales, the first entries have none; the first scale always runs all blocks.
    """

    name: ClassVar[str] = "blocks-per-scale"
    dial: ClassVar[str] = "keep_ratios"
    keep_ratios: tuple[float, ...] = (0.75, 0.5, 0.5)
    fill: Fill = "cached"

    def __post_init__(self) -> None:
        """Checks the fields."""
        is_ok = all(0 < ratio <= 1 for ratio in self.keep_ratios)
        require(is_ok, "keep_ratios", "shares in (0, 1]", list(self.keep_ratios))
        require_fill(self.fill)

    @classmethod
    def neutral(cls) -> "BlocksPerScale":
        """All blocks on every scale."""
        return cls(keep_ratios=())

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "BlocksPerScale":
        """The shares as given at level 1/2; whole blocks are spread so that the sum over scales is met best."""
        count, num_blocks = min(len(self.keep_ratios), len(schedule) - 1), shape.num_blocks
        if not count:
            return self
        tokens = [scale.num_tokens for scale in schedule.scales[-count:]]
        wanted = [share * num_blocks for share in shares_at(self.keep_ratios[-count:], level)]
        depths = [max(1, int(depth)) for depth in wanted]
        rest = sum(n * (depth - less) for n, depth, less in zip(tokens, wanted, depths, strict=True))
        open_places = [place for place in range(count) if depths[place] < num_blocks]
        choices = [some for size in range(len(open_places) + 1) for some in combinations(open_places, size)]
        deeper = min(choices, key=lambda some: abs(rest - sum(tokens[place] for place in some)))
        shares = [round((depth + (place in deeper)) / num_blocks, 4) for place, depth in enumerate(depths)]
        return self.replace(keep_ratios=(*self.keep_ratios[:-count], *shares))

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule."""
        return BoundBlocksPerScale(self.keep_ratios, self.fill, schedule, shape.num_blocks)
