"""Which packed tokens run: index lists per image, and per block.

Axes: B images, l tokens of the scale, k tokens kept of an image, n packed tokens of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.plan import ScalePlan
from foveate.core.rows import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveTokens:
    """The packed tokens that run one block: `index_n` is None where all do (no gather, the dense path)."""

    rows: Rows
    index_n: Int[Tensor, " a"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The packed list of a scale: which tokens of which image, row after row.

    `kept` holds each image's tokens in grid order, None if all run.
    """

    live: tuple[Row, ...]
    num_tokens: int
    kept: tuple[Int[Tensor, " _k"], ...] | None
    keep_Bl: Bool[Tensor, "B l"] | None
    rows: Rows

    @classmethod
    def of(cls, plan: ScalePlan, live: Sequence[Row], num_images: int, num_tokens: int) -> "TokenLayout":
        """Lays out the tokens that a plan keeps; a plan that keeps all is dense."""
        keep_Bl = plan.keep(num_images, num_tokens)
        if keep_Bl is not None and bool(keep_Bl.all()):
            keep_Bl = None
        kept = None if keep_Bl is None else tuple(row.nonzero().flatten() for row in keep_Bl)
        counts = tuple(num_tokens if kept is None else len(kept[image]) for image, _ in live)
        return cls(live=tuple(live), num_tokens=num_tokens, kept=kept, keep_Bl=keep_Bl, rows=Rows(counts))

    def pack(self, per_image: Sequence[Tensor]) -> Tensor:
        """Gathers (l, ...) tensors, one per image, into the packed list."""
        if self.kept is None:
            return torch.cat([per_image[image] for image, _ in self.live])
        return torch.cat([per_image[image][self.kept[image]] for image, _ in self.live])

    def active(self, plan: ScalePlan, block: int) -> ActiveTokens:
        """The packed tokens that run a block."""
        mask_Bl = plan.active(block)
        if mask_Bl is None:
            return ActiveTokens(rows=self.rows, index_n=None)
        images = max(image for image, _ in self.live) + 1
        masks = list(mask_Bl.expand(images, -1))
        mask_n = self.pack(masks)
        counts = tuple(int(part.sum()) for part in mask_n.split(self.rows.counts))
        if counts == self.rows.counts:
            return ActiveTokens(rows=self.rows, index_n=None)
        return ActiveTokens(rows=Rows(counts), index_n=mask_n.nonzero().flatten())
