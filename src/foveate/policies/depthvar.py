"""DepthVAR: a transformer depth per token (arXiv 2604.17286).

From some scale on each token gets a score q in [0, 1] and runs the first round(q P) of the P blocks in bit-reversal
order. A block that a token skips adds what the same block added there at the latest scale, enlarged; codes are weighted
by q. Scores come from the previous scale's changes: their percentile, rotated from scale to scale so that no token is
always favoured, through a curve whose mean is the budget. Every scale beyond the reference one costs what the reference
costs.

Where the paper is silent we chose, each as a field: the budget rule, the curve, the rotation, the rounding (a literal
floor never runs the last block and misses the budget by 13-15 % at 12 blocks), and codes weighted by q itself.
Axes: B images, l tokens, P blocks.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.cost import ModelShape
from foveate.core.errors import PlanConflictError
from foveate.core.plan import CachedFill, DepthMap, Keep, KeepOutputs, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import BlockChange, Record, Signals
from foveate.core.transfer import to_device
from foveate.policies.scores import bit_reversal_order

Curve = Literal["power", "linear", "step", "constant"]
_CURVES = ("power", "linear", "step", "constant")


def apply_curve(percentile_Bl: Float[Tensor, "B l"], budget: float, curve: Curve) -> Float[Tensor, "B l"]:
    """Maps percentiles to scores in [0, 1] whose mean is the budget."""
    if curve == "constant":
        return torch.full_like(percentile_Bl, budget)
    if curve == "step":
        return (percentile_Bl >= 1 - budget).to(percentile_Bl)
    if curve == "power":
        return percentile_Bl ** (1 / budget - 1)
    if budget <= 0.5:
        return ((percentile_Bl - 1 + 2 * budget) / (2 * budget)).clamp_min(0)
    return 2 * budget - 1 + 2 * (1 - budget) * percentile_Bl


def depth_scores(
    change_Bl: Float[Tensor, "B l"], budget: float, rotation: float = 0.0, curve: Curve = "power"
) -> Float[Tensor, "B l"]:
    """Scores in [0, 1] from each token's change: the more change, the deeper.

    Args:
        change_Bl: Any measure of change; only its order matters. Equal changes go by index.
        budget: Mean score, in (0, 1]; 1 gives 1 everywhere.
        rotation: Shifts percentiles cyclically, in [0, 1); rounded to whole ranks, so that the scores of a scale, and
            with them the counts per block, are the same numbers whatever the rotation.
        curve: From percentile to score.

    Returns:
        float64 scores.
    """
    if budget >= 1:
        return torch.ones_like(change_Bl, dtype=torch.float64)
    order_Bl = change_Bl.sort(dim=-1, stable=True).indices
    rank_Bl = torch.empty_like(order_Bl).scatter_(
        -1, order_Bl, torch.arange(change_Bl.shape[-1], device=change_Bl.device).expand_as(order_Bl)
    )
    num_tokens = change_Bl.shape[-1]
    rotated_Bl = (rank_Bl - round(rotation * num_tokens)) % num_tokens
    return to_device(score_table(num_tokens, budget, curve), change_Bl.device)[rotated_Bl]


def score_table(num_tokens: int, budget: float, curve: Curve) -> Float[Tensor, " l"]:
    """The score of every rank, lowest first; float64.

    One table for all images, made on the host: equal ranks get equal bits wherever they stand, on every device.
    """
    if budget >= 1:
        return torch.ones(num_tokens, dtype=torch.float64, device="cpu")
    return apply_curve((torch.arange(num_tokens, device="cpu")[None].double() + 0.5) / num_tokens, budget, curve)[0]


def _index_of(reference_scale: int, num_scales: int) -> int:
    """The reference as an index of the schedule.

    Raises:
        FoveateError: It is not one of the scales.
    """
    index = reference_scale if reference_scale >= 0 else num_scales + reference_scale
    possible = f"in [-{num_scales}, {num_scales - 1}] on this schedule (-1 is off)"
    require(0 <= index < num_scales, "reference_scale", possible, reference_scale)
    return index


class BoundDepthVAR(Bound):
    """DepthVAR on one schedule and model."""

    def __init__(self, policy: "DepthVAR", schedule: ScaleSchedule, num_blocks: int) -> None:
        self.policy, self.schedule, self.num_blocks = policy, schedule, num_blocks
        num_scales = len(schedule)
        self.reference = _index_of(policy.reference_scale, num_scales)
        tokens = [scale.num_tokens for scale in schedule.scales]
        self.budgets = [min(1.0, policy.budget * tokens[self.reference] / n) for n in tokens]
        self.dynamic = [s for s in range(self.reference + 1, num_scales) if self.budgets[s] < 1]
        self.changes = [BlockChange(first=block, end=block + 1) for block in range(num_blocks)]
        self.order = bit_reversal_order(num_blocks) if policy.order == "bit-reversal" else tuple(range(num_blocks))
        self.directives = (Directive.BLOCKS,) if self.dynamic else ()
        self.notes = (
            f"depthvar: reference scale {self.reference} of 0-{num_scales - 1} implies "
            f"{self.budget_speedup:.2f}x fewer token-blocks",
        )

    @property
    def budget_speedup(self) -> float:
        """Token-blocks of the full run over those of the budget: what the setting implies, before any overhead."""
        tokens = [scale.num_tokens for scale in self.schedule.scales]
        spent = sum(n * (self.budgets[s] if s in self.dynamic else 1) for s, n in enumerate(tokens))
        return sum(tokens) / spent

    def _is_read(self, scale: int) -> bool:
        """Whether a later scale reads this one."""
        return bool(self.dynamic) and self.dynamic[0] - 1 <= scale < self.dynamic[-1]

    def record(self, scale: int) -> frozenset[Record]:
        """How much each block changed each token, from the reference scale on."""
        return frozenset(self.changes) if self._is_read(scale) else frozenset()

    def keeps(self, scale: int) -> frozenset[Keep]:
        """What blocks added, where skipped blocks are filled with it."""
        return frozenset({KeepOutputs()}) if self._is_read(scale) and self.policy.fill == "cached" else frozenset()

    def rotation(self, scale: int) -> float:
        """Shift of the percentiles at a dynamic scale."""
        place = self.dynamic.index(scale)
        if self.policy.rotation == "even":
            return place / len(self.dynamic)
        if self.policy.rotation == "round-robin":
            return sum(self.budgets[s] for s in self.dynamic[:place]) % 1.0
        return 0.0

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """A depth per token from the latest changes."""
        if scale not in self.dynamic:
            return ScalePlan(), state
        if signals is None:
            raise PlanConflictError(f"depthvar plans scale {scale} from block changes, and no scale ran before it")
        grid = self.schedule.grids[scale]
        change_Bl = signals[self.changes[0]]
        for change in self.changes[1:]:
            change_Bl = change_Bl + signals[change]
        change_B1hw = change_Bl.double().unflatten(-1, signals.grid)[:, None]
        change_Bl = F.interpolate(change_B1hw, size=grid, mode="bilinear", align_corners=False).flatten(1)
        return self._of_scores(change_Bl, scale, self.rotation(scale)), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens at each depth, the first ones deepest."""
        if scale not in self.dynamic:
            return ScalePlan()
        return self._of_scores(
            -torch.arange(self.schedule.scales[scale].num_tokens, device="cpu")[None].double(), scale, 0.0
        )

    def _of_scores(self, change_Bl: Tensor, scale: int, rotation: float) -> ScalePlan:
        score_Bl = depth_scores(change_Bl, self.budgets[scale], rotation, self.policy.curve)
        depth_Bl = self._depths(score_Bl)
        weight_Bl = score_Bl if self.policy.blend == "score" else depth_Bl.float() / self.num_blocks
        return ScalePlan(
            depths=(DepthMap(depth_Bl=depth_Bl, order=self.order, counts=self._counts(scale)),),
            fill=CachedFill() if self.policy.fill == "cached" else None,
            weight_Bl=weight_Bl.float(),
        )

    def _depths(self, score: Float[Tensor, "*_ l"]) -> Int[Tensor, "*_ l"]:
        """Blocks that tokens of these scores run."""
        return (score * self.num_blocks + self.policy.rounding).floor().long().clamp_max(self.num_blocks)

    def _counts(self, scale: int) -> tuple[int, ...]:
        """How many tokens run the first, second, ... block of the order: ranks alone decide, so the host knows."""
        table_l = score_table(self.schedule.scales[scale].num_tokens, self.budgets[scale], self.policy.curve)
        places = torch.arange(self.num_blocks, device="cpu")
        return tuple((self._depths(table_l) > places[:, None]).sum(-1).tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthVAR(Policy):
    """A depth per token, with the compute of `reference_scale` (R, negative from the end) on every later scale.

    `budget` multiplies that compute: 2 lets every later scale spend what two reference scales do.
    `rotation`: "even" shifts percentiles by j/n at the j-th of n dynamic scales, "round-robin" by the budgets spent,
    "none" not at all. `rounding` is added before the floor: 0.5 rounds, 0 is the paper's literal floor. `fill`:
    "cached" adds the resized earlier change of a skipped block, "identity" nothing. `blend` weights the codes by the
    "score" or by the "depth" share.
    """

    name: ClassVar[str] = "depthvar"
    dial: ClassVar[str] = "budget"
    reference_scale: int = -4
    curve: Curve = "power"
    rotation: Literal["even", "round-robin", "none"] = "even"
    rounding: float = 0.5
    order: Literal["bit-reversal", "prefix"] = "bit-reversal"
    fill: Literal["cached", "identity"] = "cached"
    blend: Literal["score", "depth"] = "score"
    budget: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.curve in _CURVES, "curve", " or ".join(_CURVES), self.curve)
        rotations = ("even", "round-robin", "none")
        require(self.rotation in rotations, "rotation", " or ".join(rotations), self.rotation)
        require(0 <= self.rounding < 1 and math.isfinite(self.rounding), "rounding", "in [0, 1)", self.rounding)
        require(self.order in ("bit-reversal", "prefix"), "order", "bit-reversal or prefix", self.order)
        require(self.fill in ("cached", "identity"), "fill", "cached or identity", self.fill)
        require(self.blend in ("score", "depth"), "blend", "score or depth", self.blend)
        require(self.budget > 0 and math.isfinite(self.budget), "budget", "above 0", self.budget)

    @classmethod
    def neutral(cls) -> "DepthVAR":
        """The last scale as reference: nothing is beyond it."""
        return cls(reference_scale=-1)

    def at_level(self, level: float, schedule: ScaleSchedule, shape: ModelShape) -> "DepthVAR":
        """Gives every later scale this share of the last scale's compute: at level 1 all of them run in full."""
        del shape
        reference = schedule.scales[_index_of(self.reference_scale, len(schedule))]
        # Rounded up, so that the last scale is full at level 1.
        share = math.ceil(1e4 * level * schedule.scales[-1].num_tokens / reference.num_tokens) / 1e4
        return self.replace(budget=max(share, 1e-4))

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Budgets of all scales.

        Raises:
            FoveateError: `reference_scale` is not one of the scales.
        """
        return BoundDepthVAR(self, schedule, shape.num_blocks)
