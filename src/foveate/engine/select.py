"""Which tokens run: masks and index lists on the device, counts on the host, and one read of the device at most.

Where counts follow from the plan itself (ranks, shares, depths that everybody has) the device is not read at all.
Axes: B images, R rows, P blocks, l tokens of the scale, k tokens kept of an image, n packed tokens of all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.plan import ScalePlan
from foveate.core.rows import Rows
from foveate.core.transfer import numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What a plan chooses at one scale, its branches settled.

    Attributes:
        plan: Without `guided_B`: what it held has been read into `unconditional`.
        kept: Tokens kept of each image.
        keep_Bl: Which ones; None if all are, for every image.
        block_counts: Per block, tokens of each image that run it.
        run_PBl: Which ones, of those kept; None if every block runs all that are kept.
    """

    plan: ScalePlan
    kept: tuple[int, ...]
    keep_Bl: Bool[Tensor, "B l"] | None
    block_counts: tuple[tuple[int, ...], ...]
    run_PBl: Bool[Tensor, "P B l"] | None


def choose(plan: ScalePlan, num_images: int, num_tokens: int, num_blocks: int) -> Chosen:
    """Evaluates a plan for all images; reads the device once if content decides, else never."""
    keep_Bl = plan.keep(num_images, num_tokens) if plan.runs else None
    run_PBl = _run_masks(plan, keep_Bl, num_images, num_blocks) if plan.runs and plan.depths else None
    known = known_counts(plan, num_tokens, num_blocks)
    unread = [] if plan.guided_B is None else [plan.guided_B.long()]
    if known is None:
        unread += [mask.sum(-1).flatten() for mask in (keep_Bl, run_PBl) if mask is not None]
    read = torch.cat(unread).cpu().tolist() if unread else []
    columns = [tuple(read[i : i + num_images]) for i in range(0, len(read), num_images)]
    if plan.guided_B is not None:
        plan = plan.with_branches([bool(is_guided) for is_guided in columns.pop(0)])
    if known is not None:
        kept, per_block = (known[0],) * num_images, tuple((count,) * num_images for count in known[1])
    else:
        kept = (num_tokens,) * num_images if keep_Bl is None else columns.pop(0)
        per_block = tuple(columns) if columns else (kept,) * num_blocks
    return Chosen(
        plan=plan,
        kept=kept,
        keep_Bl=None if min(kept) == num_tokens else keep_Bl,
        block_counts=per_block,
        run_PBl=run_PBl,
    )


def known_counts(plan: ScalePlan, num_tokens: int, num_blocks: int) -> tuple[int, tuple[int, ...]] | None:
    """Tokens kept of each image, and that run each block, as far as they follow from the plan itself; None otherwise.

    Two restrictions that both leave something out overlap as the content decides.
    """
    kept = num_tokens
    for selection in plan.selections:
        left = selection.count(kept)
        if left is None:
            return None
        kept = left
    blocks = []
    for block in range(num_blocks):
        limits = [kept]
        for depth in plan.depths:
            if depth.counts is None:
                return None
            limits.append(depth.counts[depth.order.index(block)])
        if min(limits) and sum(limit < num_tokens for limit in limits) > 1:
            return None
        blocks.append(min(limits))
    return kept, tuple(blocks)


def _run_masks(
    plan: ScalePlan, keep_Bl: Bool[Tensor, "B l"] | None, num_images: int, num_blocks: int
) -> Bool[Tensor, "P B l"]:
    """The tokens that run each block, of those kept."""
    run_PBl = None if keep_Bl is None else keep_Bl.expand(num_blocks, -1, -1)
    for depth in plan.depths:
        place_P = numbers([depth.order.index(block) for block in range(num_blocks)], depth.depth_Bl.device)
        mask_PBl = depth.depth_Bl.expand(num_images, -1) > place_P[:, None, None]
        run_PBl = mask_PBl if run_PBl is None else run_PBl & mask_PBl
    assert run_PBl is not None, "the caller asked for depths"
    return run_PBl


def in_front(mask: Bool[Tensor, "... l"], values: Int[Tensor, "... l"]) -> Int[Tensor, "... l"]:
    """The values under the mask in their order, then the others: a stable partition that never waits for the device."""
    rank = mask.cumsum(-1)
    place = torch.arange(mask.shape[-1], device=mask.device)
    target = torch.where(mask, rank - 1, rank[..., -1:] + place - rank)
    return torch.empty_like(target).scatter_(-1, target, values.expand_as(target))


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveTokens:
    """The packed tokens that run one block: `index_n` is None where all do (no gather, the dense path)."""

    rows: Rows
    index_n: Int[Tensor, " a"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The packed list of a scale: which tokens of which image, row after row.

    `kept` holds each image's tokens in grid order, None if all run. `run_PRl` holds for every block and row the places
    in the packed list of the tokens that run it, in front and in grid order.
    """

    live: tuple[Row, ...]
    num_tokens: int
    kept: tuple[Int[Tensor, " _k"], ...] | None
    keep_Bl: Bool[Tensor, "B l"] | None
    rows: Rows
    block_counts: tuple[tuple[int, ...], ...]
    run_PRl: Int[Tensor, "P R l"] | None
    known_rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)

    @classmethod
    def of(cls, chosen: Chosen, live: Sequence[Row], num_tokens: int) -> "TokenLayout":
        """Lays out the tokens that were chosen; where all are kept the list is dense."""
        keep_Bl, kept, place_Bl = chosen.keep_Bl, None, None
        if keep_Bl is not None:
            grid_l = torch.arange(num_tokens, device=keep_Bl.device)
            kept = tuple(row[:count] for row, count in zip(in_front(keep_Bl, grid_l), chosen.kept, strict=True))
            place_Bl = keep_Bl.cumsum(-1) - 1
        rows = Rows(tuple(chosen.kept[image] for image, _ in live))
        counts = tuple(tuple(block[image] for image, _ in live) for block in chosen.block_counts)
        run_PRl = None
        if chosen.run_PBl is not None and any(block != rows.counts for block in counts):
            run_PRl = _row_lists(chosen.run_PBl, place_Bl, live, rows)
        return cls(
            live=tuple(live),
            num_tokens=num_tokens,
            kept=kept,
            keep_Bl=keep_Bl,
            rows=rows,
            block_counts=counts,
            run_PRl=run_PRl,
        )

    @property
    def is_dense(self) -> bool:
        """Whether all tokens of every image run all blocks."""
        return self.kept is None and self.run_PRl is None

    def pack(self, per_image: Sequence[Tensor]) -> Tensor:
        """Gathers (l, ...) tensors, one per image, into the packed list."""
        if self.kept is None:
            return torch.cat([per_image[image] for image, _ in self.live])
        return torch.cat([per_image[image][self.kept[image]] for image, _ in self.live])

    def active(self, block: int) -> ActiveTokens:
        """The packed tokens that run a block, row after row and in grid order."""
        counts = self.block_counts[block]
        if self.run_PRl is None or counts == self.rows.counts:
            return ActiveTokens(rows=self.rows, index_n=None)
        rows = self.known_rows.setdefault(counts, Rows(counts))
        lists_Rl = self.run_PRl[block]
        if rows.uniform is not None:
            return ActiveTokens(rows=rows, index_n=lists_Rl[:, : rows.uniform].flatten())
        return ActiveTokens(rows=rows, index_n=torch.cat([row[:n] for row, n in zip(lists_Rl, counts, strict=True)]))


def _row_lists(
    run_PBl: Bool[Tensor, "P B l"], place_Bl: Int[Tensor, "B l"] | None, live: Sequence[Row], rows: Rows
) -> Int[Tensor, "P R l"]:
    """Per block and row, the places in the packed list of the tokens that run, in front; behind them anything."""
    if place_Bl is None:
        place_Bl = torch.arange(run_PBl.shape[-1], device=run_PBl.device)[None]
    lists_PBl = in_front(run_PBl, place_Bl)
    starts = zip(live, rows.starts, strict=False)
    return torch.stack([lists_PBl[:, image] + start for (image, _), start in starts], dim=1)
