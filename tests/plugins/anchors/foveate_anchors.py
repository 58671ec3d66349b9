"""Anchors: at the last scale a lattice of tokens runs and the others copy. A toy plug-in: another package's policy."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.core.cost import ModelShape
from foveate.core.plan import Base, ScalePlan
from foveate.core.policy import Bound, Directive, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.core.selection import MaskSelection
from foveate.core.signals import Signals


class BoundAnchors(Bound):
    """One mask and one map of sources."""

    def __init__(self, stride: int, schedule: ScaleSchedule) -> None:
        self.last, (height, width) = len(schedule) - 1, schedule.grids[-1]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        source_hw = (y - y % stride) * width + x - x % stride
        self.source_Bl = source_hw.flatten()[None]
        self.mask_Bl = self.source_Bl == torch.arange(height * width)
        self.directives = (Directive.TOKENS,) if not self.mask_Bl.all() else ()

    def plan(self, scale: int, signals: Signals | None, state: Any, *, mask_Bl: Any = None) -> tuple[ScalePlan, Any]:
        """The anchors run and everybody else copies one."""
        if scale < self.last or not self.directives:
            return ScalePlan(), state
        mask_Bl = self.mask_Bl if mask_Bl is None else mask_Bl
        selection = MaskSelection(mask_Bl=mask_Bl, kept=int(self.mask_Bl.sum()))
        return ScalePlan(selections=(selection,), base=Base.COPY, source_Bl=self.source_Bl), state

    def ceiling(self, scale: int) -> ScalePlan:
        """As many tokens, the first ones."""
        first_Bl = torch.arange(self.mask_Bl.shape[1])[None] < self.mask_Bl.sum()
        return self.plan(scale, None, None, mask_Bl=first_Bl)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors(Policy):
    """Runs every `stride`-th token of every `stride`-th row of the last scale."""

    name: ClassVar[str] = "anchors"
    stride: int = 1

    @classmethod
    def neutral(cls) -> "Anchors":
        """Runs all."""
        return cls()

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """A lattice over the last grid."""
        return BoundAnchors(self.stride, schedule)
