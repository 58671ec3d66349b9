"""LateBfloat16: the blocks of the last scales compute in bfloat16. The control for every claim about speed.

On a CPU with AVX-512 BF16, bfloat16 is about twice as fast as float32, so a table without this row credits a method
with what a dtype brings by itself. Hidden states, head and sampling stay float32 and the cache keeps the model's dtype;
earlier keys and values are rounded where such a block reads them. No FLOPs are saved, and a second copy of the blocks
is held.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.core.cost import ModelShape
from foveate.core.plan import BlockDtype, ScalePlan
from foveate.core.policy import Bound, Directive, Policy, require
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals


class BoundLateBfloat16(Bound):
    """Narrows the blocks from `dtype.first` on, from the scale `first_narrow` on."""

    def __init__(self, dtype: BlockDtype, first_narrow: int, num_scales: int) -> None:
        self.dtype, self.first_narrow = dtype, first_narrow
        self.directives = (Directive.DTYPE,) if first_narrow < num_scales else ()

    def plan(self, scale: int, signals: Signals | None, state: Any) -> tuple[ScalePlan, Any]:
        """Everything runs, from one scale on in bfloat16."""
        return ScalePlan(dtypes=(self.dtype,) if scale >= self.first_narrow else ()), state


@dataclass(frozen=True, kw_only=True, slots=True)
class LateBfloat16(Policy):
    """Runs the blocks from `first_block` on in bfloat16 on the last `count` scales.

    On a model that computes in bfloat16 it has no effect, and the report says so.
    """

    name: ClassVar[str] = "late-bfloat16"
    count: int = 3
    first_block: int = 0

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self.count >= 0, "count", "0 or more", self.count)
        require(self.first_block >= 0, "first_block", "0 or more", self.first_block)

    @classmethod
    def neutral(cls) -> "LateBfloat16":
        """No scale."""
        return cls(count=0)

    def bind(self, schedule: ScaleSchedule, shape: ModelShape) -> Bound:
        """Counts from the end of the schedule; a larger count narrows every scale."""
        num_scales = len(schedule)
        first_narrow = max(num_scales - self.count, 0) if self.first_block < shape.num_blocks else num_scales
        return BoundLateBfloat16(BlockDtype(dtype=torch.bfloat16, first=self.first_block), first_narrow, num_scales)
