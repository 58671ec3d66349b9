"""SparseVAR: "Frequency-Aware Autoregressive Modeling" (ICCV 2025, arXiv 2507.20454). Flat areas copy an anchor.

The scale before the first pruned one says how much a range of blocks changes each token: mean squared change, averaged
over the branches. The share of tokens that change by more than `threshold` of the largest is the share that runs on
every later scale, those that change most. A lattice of anchors always runs. A dropped token copies the one of the
four anchors around it whose logits of the previous scale are most like its own, or commits zero where none is alike.

Where the paper is silent we chose: all blocks as the range; the changes of that one scale, resized bilinearly, rank
the tokens of every pruned scale; anchors stand at multiples of the stride, and the four are the corners of a token's
lattice cell (fewer beyond the last anchor); the logits of a token are those at its place in the previous grid, nearest,
conditional branch, before guidance. Where that place did not run a token is like no anchor and no anchor like it.
We differ in one point: the paper copies the last hidden state, which then samples by itself; we copy the sampled code.
Axes: B images, l tokens, k tokens that ran at the previous scale, V outputs, c corners.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.errors import PlanConflictError
from foveate.core.plan import Base, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import Grid, ScaleSchedule
from foveate.core.selection import MaskSelection, keep_by_count
from foveate.core.signals import BlockChange, BranchLogits, Record, Signal, Signals
from foveate.core.transfer import to_device
from foveate.policies.scores import resized_scores


def anchor_corners(grid: Grid, stride: int) -> Int[Tensor, "c l"]:
    """Per token the anchors at the four corners of its lattice cell; beyond the last anchors the nearer ones twice.

    The first is the corner towards the origin, so a token is an anchor exactly where that is the token itself.
    """
    sides = []
    for size in grid:
        before = torch.arange(size, device="cpu") // stride * stride
        sides.append((before, (before + stride).clamp_max((size - 1) // stride * stride)))
    return torch.stack([(y[:, None] * grid[1] + x).flatten() for y in sides[0] for x in sides[1]])


def places_in(previous: Grid, grid: Grid) -> Int[Tensor, " l"]:
    """For each token of a grid, the token of an earlier grid at its place, as nearest enlargement has it."""
    y, x = (torch.arange(size, device="cpu") * before // size for size, before in zip(grid, previous, strict=True))
    return (y[:, None] * previous[1] + x).flatten()


def most_similar(
    logits: BranchLogits,
    place_l: Int[Tensor, " l"],
    corner_cl: Int[Tensor, "c l"],
    num_previous: int,
    similarity: float,
) -> Int[Tensor, " l"]:
    """Per token its most similar anchor by cosine of the conditional logits; itself where none is above `similarity`.

    Args:
        logits: Of the previous scale.
        place_l: Each token's place in the previous grid.
        corner_cl: Each token's anchors.
        num_previous: Tokens of the previous grid.
        similarity: What the cosine must exceed.
    """
    unit_kV = F.normalize(logits.cond_kV.float(), dim=-1)
    row_l = place_l
    if logits.index_k is not None:
        row_of = torch.full((num_previous,), -1, dtype=torch.long, device=place_l.device)
        row_of[logits.index_k] = torch.arange(len(unit_kV), device=place_l.device)
        row_l = row_of[place_l]
    own_lV = unit_kV[row_l.clamp_min(0)]
    cosines = []
    for anchor_l in corner_cl:
        theirs_l = row_l[anchor_l]
        cosine_l = (own_lV * unit_kV[theirs_l.clamp_min(0)]).sum(-1)
        cosines.append(cosine_l.masked_fill((row_l < 0) | (theirs_l < 0), -torch.inf))
    best_l, corner_l = torch.stack(cosines).max(0)
    own_l = torch.arange(len(place_l), device=place_l.device)
    return torch.where(best_l > similarity, corner_cl.gather(0, corner_l[None])[0], own_l)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Reference:
    """What the scale before the first pruned one left: its grid, the change of its tokens, and the share that runs."""

    grid: Grid
    change_Bl: Float[Tensor, "B l"]
    share_B1: Float[Tensor, "B 1"]


class BoundSparseVAR(Bound):
    """SparseVAR on one schedule and model."""

    def __init__(self, policy: "SparseVAR", schedule: ScaleSchedule, num_blocks: int) -> None:
        self.policy, self.schedule = policy, schedule
        self.first = max(len(schedule) - policy.num_scales, 1)
        first = policy.first_block + (num_blocks if policy.first_block < 0 else 0)
        end = policy.end_block + (num_blocks if policy.end_block <= 0 else 0)
        is_range = 0 <= first < end <= num_blocks
        rule = f"a range within the {num_blocks} blocks"
        require(is_range, "first_block to end_block", rule, f"{policy.first_block} to {policy.end_block}")
        self.change = BlockChange(first=first, end=end, power=2, branches="mean")
        self.is_on = policy.stride > 1 and self.first < len(schedule)
        self.directives = (Directive.TOKENS,) if self.is_on else ()
        self.is_static = not self.is_on

    def record(self, scale: int) -> frozenset[Record]:
        """The change of the tokens once, and logits at every scale that a pruned one follows."""
        if not self.is_on or not self.first - 1 <= scale < len(self.schedule) - 1:
            return frozenset()
        return frozenset({Signal.LOGITS, self.change} if scale == self.first - 1 else {Signal.LOGITS})

    def ceiling(self, scale: int) -> ScalePlan:
        """Content decides, so the bound is everything; its base makes compositions fail before they run."""
        if not self.is_on or scale < self.first:
            return ScalePlan()
        return ScalePlan(
            base=Base.COPY, source_Bl=torch.arange(self.schedule.scales[scale].num_tokens, device="cpu")[None]
        )

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Runs the anchors and the tokens that changed most; the others copy an anchor."""
        if not self.is_on or scale < self.first:
            return ScalePlan(), state
        if signals is not None and signals.scale < scale - 1:
            # Another part of a composition has ended the image: it may leave out scales at the end only.
            return ScalePlan(), state
        if signals is None or signals.logits is None:
            raise PlanConflictError(f"sparsevar plans scale {scale} from the logits before, and none were recorded")
        if state is None:
            state = self._reference(signals)
        grid, device = self.schedule.grids[scale], state.change_Bl.device
        change_Bm = resized_scores(state.change_Bl, state.grid, grid)
        count_B1 = (state.share_B1 * change_Bm.shape[-1] - 1e-9).ceil().long()
        corner_cm = to_device(anchor_corners(grid, self.policy.stride), device)
        is_anchor_m = corner_cm[0] == torch.arange(change_Bm.shape[-1], device=device)
        place_m = to_device(places_in(signals.grid, grid), device)
        num_previous = signals.grid[0] * signals.grid[1]
        sources = [
            most_similar(logits, place_m, corner_cm, num_previous, self.policy.similarity) for logits in signals.logits
        ]
        selection = MaskSelection(mask_Bl=keep_by_count(change_Bm, count_B1) | is_anchor_m, kept=None)
        return ScalePlan(selections=(selection,), base=Base.COPY, source_Bl=torch.stack(sources)), state

    def _reference(self, signals: Signals) -> _Reference:
        """The share of each image's tokens that change by more than the threshold times the largest change."""
        change_Bl = signals[self.change]
        is_high_Bl = change_Bl > self.policy.threshold * change_Bl.amax(-1, keepdim=True)
        share_B1 = is_high_Bl.double().mean(-1, keepdim=True)
        return _Reference(grid=signals.grid, change_Bl=change_Bl, share_B1=share_B1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseVAR(Policy):
    """Runs what changes much, and anchors, on the last `num_scales` scales; the rest copies an anchor or commits zero.

    `threshold`, in [0, 1), of the largest change decides how many tokens of an image run. `stride` is the distance of
    the anchors; 1 runs everything. `similarity`, in [-1, 1], is the cosine above which an anchor is copied. The change
    is that of the blocks `first_block` up to `end_block`, which is left out; negative ones and an `end_block` of 0
    count from the end.
    """

    name: ClassVar[str] = "sparsevar"
    num_scales: int = 3
    threshold: float = 0.6
    similarity: float = 0.8
    stride: int = 4
    first_block: int = 0
    end_block: int = 0

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.num_scales >= 0, "num_scales", "0 or more", self.num_scales)
        require(0 <= self.threshold < 1, "threshold", "in [0, 1)", self.threshold)
        require(-1 <= self.similarity <= 1, "similarity", "in [-1, 1]", self.similarity)
        require(self.stride >= 1, "stride", "1 or more", self.stride)

    @classmethod
    def neutral(cls) -> "SparseVAR":
        """Prunes no scale."""
        return cls(num_scales=0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; scale 0 always runs.

        Raises:
            FoveateError: The model has no such blocks.
        """
        return BoundSparseVAR(self, schedule, shape.num_blocks)
