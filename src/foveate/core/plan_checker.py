"""Checks a plan where the engine takes it, so that a wrong one fails by name and not inside a kernel.

Axes: B images, l tokens of the scale.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.plan import Base, DepthMap, ScalePlan, Spread, SpreadDifference, said_base
from foveate.core.selection import Selection

MAX_AXES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanChecker:
    """Checks a plan where the engine takes it, so that a wrong one fails by name and not inside a kernel.

    Types, lengths and shares are always checked. Values of maps are read only where that costs no wait: on a CPU.
    """

    policy: str
    num_images: int
    num_blocks: int
    num_scales: int

    def check(self, plan: ScalePlan, scale: int, num_tokens: int) -> None:
        """Checks everything.

        Raises:
            PlanConflictError: Names the policy, the scale and the field, and says what it must be.
        """
        self._maps(plan, scale, num_tokens)
        self._sublayers(plan, scale, num_tokens)
        branches = plan.unconditional
        self._require(branches is None or len(branches) in (1, self.num_images), scale, "unconditional",
                      f"one entry or {self.num_images}", branches)  # fmt: skip
        is_past = all(0 <= s <= scale for s in plan.evict)
        self._require(is_past, scale, "evict", f"scales from 0 to {scale}", plan.evict)
        is_copy = plan.base is Base.COPY
        self._require((plan.source_Bl is not None) == is_copy, scale, "source_Bl", "given exactly with Base.COPY",
                      said_base(plan.base))  # fmt: skip
        for name, part in (("base", plan.base), ("difference", plan.difference)):
            if isinstance(part, Spread | SpreadDifference):
                lengths = [getattr(part, field.name) for field in fields(part)]
                is_length = all(0 < length < math.inf for length in lengths)
                self._require(is_length, scale, name, "made of finite numbers above 0", part)
        is_known = plan.fill is None or plan.fill.source is None or plan.fill.source < scale
        self._require(is_known, scale, "fill.source", f"a scale before {scale}", plan.fill)

    def _maps(self, plan: ScalePlan, scale: int, num_tokens: int) -> None:
        for name, part in [
            *(("selections", part) for part in plan.selections),
            *(("unconditional_tokens", part) for part in plan.unconditional_tokens),
        ]:
            self._map(part.token_map, scale, name, num_tokens, wide=True)
            share = getattr(part, "share", 1.0)
            self._require(0 < share <= 1, scale, f"{name}.share", "in (0, 1]", share)
            self._mask_count(part, scale, name, num_tokens)
        for depth in plan.depths:
            self._map(depth.depth_Bl, scale, "depths.depth_Bl", num_tokens, wide=True)
            is_order = sorted(depth.order) == list(range(self.num_blocks))
            self._require(is_order, scale, "depths.order", f"every block of {self.num_blocks} once", depth.order)
            self._depth_counts(depth, scale)
        for name in ("weight_Bl", "base_weight_Bl"):
            map_Bl = getattr(plan, name)
            if map_Bl is not None:
                self._map(map_Bl, scale, name, num_tokens, wide=False)
        if plan.source_Bl is not None:
            self._map(plan.source_Bl, scale, "source_Bl", num_tokens, wide=True)
            is_inside = plan.source_Bl.device.type != "cpu" or bool(
                ((plan.source_Bl >= 0) & (plan.source_Bl < num_tokens)).all()
            )
            self._require(is_inside, scale, "source_Bl", f"indices of the {num_tokens} tokens", "others")

    def _map(self, map_Bl: Tensor, scale: int, name: str, num_tokens: int, *, wide: bool) -> None:
        shape = tuple(map_Bl.shape)
        lengths = (num_tokens,) if wide else (1, num_tokens)
        is_fit = len(shape) == MAX_AXES and shape[0] in (1, self.num_images) and shape[1] in lengths
        self._require(is_fit, scale, name, f"(1 or {self.num_images}, {num_tokens})", shape)
        if map_Bl.device.type == "cpu" and map_Bl.is_floating_point():
            self._require(not bool(map_Bl.isnan().any()), scale, name, "numbers", "NaN")

    def _mask_count(self, part: Selection, scale: int, name: str, num_tokens: int) -> None:
        kept = getattr(part, "kept", None)
        if kept is not None and part.token_map.device.type == "cpu":
            counts = part.token_map.sum(-1)
            self._require(bool((counts == kept).all()), scale, f"{name}.kept", "what its mask keeps", kept)
        self._require(kept is None or 0 < kept <= num_tokens, scale, f"{name}.kept", f"in 1 to {num_tokens}", kept)

    def _depth_counts(self, depth: DepthMap, scale: int) -> None:
        if depth.counts is None:
            return
        is_long = len(depth.counts) == self.num_blocks
        self._require(is_long, scale, "depths.counts", f"{self.num_blocks} numbers", depth.counts)
        if depth.depth_Bl.device.type == "cpu":
            places = torch.arange(self.num_blocks, device="cpu")[:, None, None]
            counts_P1 = torch.tensor(depth.counts, dtype=torch.long, device="cpu")[:, None]
            is_true = bool(((depth.depth_Bl > places).sum(-1) == counts_P1).all())
            self._require(is_true, scale, "depths.counts", "what its depths give", depth.counts)

    def _sublayers(self, plan: ScalePlan, scale: int, num_tokens: int) -> None:
        for part in plan.sublayers:
            is_block = all(0 <= block < self.num_blocks for block in part.blocks)
            self._require(is_block, scale, "sublayers.blocks", f"blocks of {self.num_blocks}", part.blocks)
            is_count = 0 < part.count <= num_tokens
            self._require(is_count, scale, "sublayers.count", f"in 1 to {num_tokens}", part.count)
        for dtype in plan.dtypes:
            self._require(dtype.dtype.is_floating_point, scale, "dtypes", "of floats", dtype.dtype)

    def _require(self, ok: bool, scale: int, name: str, rule: str, value: object) -> None:
        if not ok:
            raise PlanConflictError(f"{self.policy}: plan of scale {scale}: {name} must be {rule}, got {value}")
