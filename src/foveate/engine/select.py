"""Which tokens run: masks and index lists on the device, counts on the host, and one read of the device at most.

Where counts follow from the plan itself (ranks, shares, depths that everybody has) the device is not read at all.
Axes: B images, P blocks, l tokens of the scale, G branches that differ (1 where both run the same tokens, else 2).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from foveate.core.plan import ScalePlan, narrowed
from foveate.core.transfer import numbers

Counts = tuple[tuple[int, ...], ...]
"""Per branch that differs, a number per image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What a plan chooses at one scale, its branches settled.

    Attributes:
        plan: Without `guided_B`: what it held has been read into `unconditional`.
        kept: Tokens kept of each image.
        keep_GBl: Which ones; None if all are, for every image and branch.
        block_counts: Per block, tokens of each image that run it.
        run_PGBl: Which ones, of those kept; None if every block runs all that are kept.
    """

    plan: ScalePlan
    kept: Counts
    keep_GBl: Bool[Tensor, "G B l"] | None
    block_counts: tuple[Counts, ...]
    run_PGBl: Bool[Tensor, "P G B l"] | None

    def branch(self, is_cond: bool) -> int:
        """The place of a branch on the axis G."""
        return 0 if is_cond else len(self.kept) - 1


def choose(plan: ScalePlan, num_images: int, num_tokens: int, num_blocks: int) -> Chosen:
    """Evaluates a plan for all images; reads the device once if content decides, else never."""
    keep_GBl = _keep_masks(plan, num_images, num_tokens) if plan.runs else None
    run_PGBl = _run_masks(plan, keep_GBl, num_images, num_blocks) if plan.runs and plan.depths else None
    num_branches = 2 if plan.unconditional_tokens else 1
    known = [known_counts(plan, num_tokens, num_blocks, is_cond=is_cond) for is_cond in (True, False)[:num_branches]]
    is_known = all(counts is not None for counts in known)
    unread = [] if plan.guided_B is None else [plan.guided_B.long()]
    if not is_known:
        unread += [mask.sum(-1).flatten() for mask in (keep_GBl, run_PGBl) if mask is not None]
    read = torch.cat(unread).cpu().tolist() if unread else []
    columns = [tuple(read[i : i + num_images]) for i in range(0, len(read), num_images)]
    if plan.guided_B is not None:
        plan = plan.with_branches([bool(is_guided) for is_guided in columns.pop(0)])
    groups = [tuple(columns[i : i + num_branches]) for i in range(0, len(columns), num_branches)]
    if is_known:
        kept: Counts = tuple((counts[0],) * num_images for counts in known if counts is not None)
        per_block = tuple(
            tuple((counts[1][block],) * num_images for counts in known if counts is not None)
            for block in range(num_blocks)
        )
    else:
        kept = ((num_tokens,) * num_images,) * num_branches if keep_GBl is None else groups.pop(0)
        per_block = tuple(groups) if groups else (kept,) * num_blocks
    is_whole = all(min(counts) == num_tokens for counts in kept)
    return Chosen(
        plan=plan,
        kept=kept,
        keep_GBl=None if is_whole else keep_GBl,
        block_counts=per_block,
        run_PGBl=run_PGBl,
    )


def known_counts(
    plan: ScalePlan, num_tokens: int, num_blocks: int, *, is_cond: bool = True
) -> tuple[int, tuple[int, ...]] | None:
    """Tokens kept of each image, and that run each block, as far as they follow from the plan itself; None otherwise.

    Two restrictions that both leave something out overlap as the content decides.
    """
    kept = num_tokens
    for selection in plan.selections if is_cond else (*plan.selections, *plan.unconditional_tokens):
        left = selection.count(kept, num_tokens)
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


def _keep_masks(plan: ScalePlan, num_images: int, num_tokens: int) -> Bool[Tensor, "G B l"] | None:
    """The tokens that each branch keeps; None if both keep all."""
    cond_Bl = plan.keep(num_images, num_tokens)
    if not plan.unconditional_tokens:
        return None if cond_Bl is None else cond_Bl[None]
    uncond_Bl = narrowed(plan.unconditional_tokens, cond_Bl, num_images, num_tokens)
    assert uncond_Bl is not None, "there is a selection"
    return torch.stack([torch.ones_like(uncond_Bl) if cond_Bl is None else cond_Bl, uncond_Bl])


def _run_masks(
    plan: ScalePlan, keep_GBl: Bool[Tensor, "G B l"] | None, num_images: int, num_blocks: int
) -> Bool[Tensor, "P G B l"]:
    """The tokens that run each block, of those kept."""
    run_PGBl = None if keep_GBl is None else keep_GBl.expand(num_blocks, -1, -1, -1)
    for depth in plan.depths:
        place_P = numbers([depth.order.index(block) for block in range(num_blocks)], depth.depth_Bl.device)
        mask_PGBl = depth.depth_Bl.expand(num_images, -1)[None] > place_P[:, None, None, None]
        run_PGBl = mask_PGBl if run_PGBl is None else run_PGBl & mask_PGBl
    assert run_PGBl is not None, "the caller asked for depths"
    return run_PGBl


def in_front(mask: Bool[Tensor, "... l"], values: Int[Tensor, "... l"]) -> Int[Tensor, "... l"]:
    """The values under the mask in their order, then the others: a stable partition that never waits for the device."""
    rank = mask.cumsum(-1)
    place = torch.arange(mask.shape[-1], device=mask.device)
    target = torch.where(mask, rank - 1, rank[..., -1:] + place - rank)
    return torch.empty_like(target).scatter_(-1, target, values.expand_as(target))
