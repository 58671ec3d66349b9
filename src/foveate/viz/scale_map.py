"""What one image ran at one scale, as both drawings of it need it: the sheet of `maps` and the HTML page.

Axes: h, w grid of the scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int16

from foveate.core.cost import Row, RowWork
from foveate.core.errors import FoveateError
from foveate.core.schedule import Grid
from foveate.core.trace import ScaleTrace, Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleMap:
    """One scale of one image.

    Attributes:
        scale: Its index in the full schedule.
        grid: Rows and columns of tokens.
        num_blocks: Depth of the whole transformer.
        depth_hw: Blocks that each token ran in the conditional branch, -1 where it did not run; None where the whole
            scale did not.
        num_guided: Tokens that ran in the unconditional branch, too; 0 means one branch.
    """

    scale: int
    grid: Grid
    num_blocks: int
    depth_hw: Int16[np.ndarray, "h w"] | None
    num_guided: int = 0

    def __post_init__(self) -> None:
        if self.depth_hw is not None and self.depth_hw.shape != self.grid:
            raise FoveateError(f"the depths of a {self.grid} grid have its shape, got {self.depth_hw.shape}")

    @property
    def num_tokens(self) -> int:
        """Tokens that ran."""
        return 0 if self.depth_hw is None else int((self.depth_hw >= 0).sum())

    @property
    def block_share(self) -> float:
        """Blocks that the conditional branch ran, of all blocks of all tokens, in [0, 1]."""
        if self.depth_hw is None:
            return 0.0
        return int(self.depth_hw.clip(0).sum()) / (self.num_blocks * self.depth_hw.size)

    @property
    def caption(self) -> str:
        """Tokens, blocks and branches in a line."""
        if self.depth_hw is None:
            return "did not run"
        shares = f"{self.num_tokens}/{self.depth_hw.size} tokens, {100 * self.block_share:.0f} % of blocks"
        return f"{shares}, {self._branches}"

    @property
    def _branches(self) -> str:
        if not self.num_guided:
            return "one branch"
        if self.num_guided < self.num_tokens:
            return f"two branches on {self.num_guided} tokens"
        return "two branches"


def scale_map(scale: ScaleTrace, image_index: int, num_blocks: int) -> ScaleMap:
    """One scale of a trace, for one image of the batch.

    Raises:
        FoveateError: The trace was recorded without maps, or has no such image.
    """
    if not scale.ran:
        return ScaleMap(scale=scale.scale, grid=scale.grid, num_blocks=num_blocks, depth_hw=None)
    if scale.keep_Bl is None or scale.depth_Bl is None:
        raise FoveateError("the trace has no maps; generate with trace=True")
    if not 0 <= image_index < len(scale.keep_Bl):
        raise FoveateError(f"image_index must be from 0 to {len(scale.keep_Bl) - 1}, got {image_index}")
    keep_hw = scale.keep_Bl[image_index].view(scale.grid).numpy()
    depth_hw = scale.depth_Bl[image_index].view(scale.grid).numpy()
    return ScaleMap(
        scale=scale.scale,
        grid=scale.grid,
        num_blocks=num_blocks,
        depth_hw=np.where(keep_hw, depth_hw, -1).astype(np.int16),
        num_guided=_num_guided(scale.work.rows, image_index, int(keep_hw.sum())),
    )


def _num_guided(rows: Mapping[Row, RowWork], image_index: int, num_tokens: int) -> int:
    """Tokens of the unconditional branch; a branch that ran what the other did counts all, whatever their depth."""
    if (image_index, False) not in rows:
        return 0
    conditional, unconditional = (max(rows[image_index, branch].block_tokens, default=0) for branch in (True, False))
    return num_tokens if unconditional >= conditional else unconditional


def scale_maps(trace: Trace, image_index: int = 0) -> tuple[ScaleMap, ...]:
    """All scales of one image of a batch, recorded with `trace=True`."""
    return tuple(scale_map(scale, image_index, trace.shape.num_blocks) for scale in trace.scales)
