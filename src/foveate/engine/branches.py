"""Conditional and unconditional rows: their outputs image by image, what is kept of them, and how they combine.

Rows are ordered: all conditional ones, then the unconditional ones that still run.
Axes: n packed tokens, k tokens of one row, u those of them that ran in both branches, C width, V outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.errors import PlanConflictError
from foveate.core.plan import SpreadDifference
from foveate.core.protocols import ScaleTokenizer
from foveate.core.rows import Rows
from foveate.core.signals import BranchLogits
from foveate.engine.fills import Difference
from foveate.engine.scale_run import ScaleRun
from foveate.engine.spread import confidence, spread


def combine_logits(logits: Sequence[BranchLogits], weight: float, temperature: float) -> list[Float[Tensor, "_k V"]]:
    """Guided logits of each image, over the temperature; conditional ones where the other branch did not run."""
    guided = []
    for both in logits:
        cond_kV = both.cond_kV * (1 / temperature)
        if weight == 1.0 or both.uncond_kV is None:
            guided.append(cond_kV)
        elif both.uncond_index_u is None:
            guided.append(weight * cond_kV + (1 - weight) * (both.uncond_kV * (1 / temperature)))
        else:
            cond_uV = cond_kV[both.uncond_index_u]
            cond_kV[both.uncond_index_u] = weight * cond_uV + (1 - weight) * (both.uncond_kV * (1 / temperature))
            guided.append(cond_kV)
    return guided


def combine_hidden_(x_nC: Float[Tensor, "n C"], live: Sequence[Row], rows: Rows, weight: float) -> None:
    """Replaces the hidden states of both branches by their combination, where both run; in place."""
    if weight == 1.0:
        return
    parts: Mapping[Row, Tensor] = dict(zip(live, x_nC.split(rows.counts), strict=True))
    for image in {image for image, is_cond in live if not is_cond}:
        cond_kC, uncond_kC = parts[(image, True)], parts[(image, False)]
        mixed_kC = weight * cond_kC + (1 - weight) * uncond_kC
        cond_kC.copy_(mixed_kC)
        uncond_kC.copy_(mixed_kC)


def per_image(run: ScaleRun, packed_kV: Float[Tensor, "k V"]) -> tuple[BranchLogits, ...]:
    """Head inputs or outputs of the headed rows, image by image."""
    rows = [(row, kept) for row, kept, n in zip(run.live, run.kept, run.headed, strict=True) if n]
    parts = packed_kV.split([n for n in run.headed if n])
    found = {row: (part, kept) for (row, kept), part in zip(rows, parts, strict=True)}
    images = []
    for image in range(run.state.request.num_images):
        cond_kV, kept = found[(image, True)]
        uncond_kV, uncond_kept = found.get((image, False), (None, None))
        images.append(
            BranchLogits(
                cond_kV=cond_kV,
                uncond_kV=uncond_kV,
                index_k=kept,
                uncond_index_u=_inside(run, kept, uncond_kept) if uncond_kV is not None else None,
            )
        )
    return tuple(images)


def _inside(run: ScaleRun, kept: Tensor | None, uncond_kept: Tensor | None) -> Int[Tensor, " u"] | None:
    """Places of the unconditional branch's tokens among the kept ones; None where both branches kept the same."""
    if not run.plan.unconditional_tokens or uncond_kept is None:
        return None
    if kept is None:
        return uncond_kept
    return torch.searchsorted(kept.contiguous(), uncond_kept.contiguous())


def guide_by_difference(
    run: ScaleRun, images: Sequence[BranchLogits], tokenizer: ScaleTokenizer
) -> tuple[BranchLogits, ...]:
    """Adds a difference d where the unconditional branch did not run: w cond + (1 - w) (cond - d).

    A branch that had stopped before a difference could be kept, or that runs no token to spread from, leaves the
    conditional branch alone.

    Raises:
        PlanConflictError: No difference was kept, though the branch of an image ran until now.
    """
    word, weight = run.plan.difference, run.weight
    is_whole = all(image.uncond_kV is not None and image.uncond_index_u is None for image in images)
    if word is None or weight == 1.0 or is_whole:
        return tuple(images)
    if isinstance(word, SpreadDifference):
        input_BZhw = tokenizer.next_input(run.state.f_hat_BZHW, run.scale.grid)
        return tuple(_spread(image, word, weight - 1, input_BZhw[i]) for i, image in enumerate(images))
    if run.state.difference is None:
        if run.state.dropped >= set(range(len(images))):
            return tuple(images)
        raise PlanConflictError(
            f"{run.state.bound.label}: scale {run.scale.index} is guided by a cached difference, but no scale "
            "that ran both branches was kept"
        )
    map_BlW = run.state.difference.resized(run.scale.grid)
    return tuple(_guided(image, map_BlW[i], (weight - 1) * word.weight) for i, image in enumerate(images))


def _spread(
    image: BranchLogits, word: SpreadDifference, factor: float, input_Zhw: Float[Tensor, "Z h w"]
) -> BranchLogits:
    """Guides the tokens that ran in one branch by the spread difference of those that ran in both."""
    both, index_u = image.both(), image.uncond_index_u
    if both is None or index_u is None:
        return image
    places_u = index_u if image.index_k is None else image.index_k[index_u]
    difference_uW = both[0] - both[1]
    map_lW, _ = spread(difference_uW, places_u, input_Zhw, word.sigma, word.likeness)
    return _guided(image, map_lW * confidence(difference_uW, map_lW[places_u]), factor)


def _guided(image: BranchLogits, map_lW: Float[Tensor, "l W"], factor: float) -> BranchLogits:
    if image.uncond_kV is not None and image.uncond_index_u is None:
        return image
    added_kW = factor * (map_lW if image.index_k is None else map_lW[image.index_k])
    if image.uncond_index_u is not None:
        added_kW = added_kW.index_fill(0, image.uncond_index_u, 0.0)
    return replace(image, cond_kV=image.cond_kV + added_kW)


def difference_of(run: ScaleRun, images: Sequence[BranchLogits]) -> Difference | None:
    """Difference of the branches on the whole grid, to be kept: zero where the branch has stopped, None if all have."""
    if all(image.uncond_kV is None for image in images):
        return None
    width = images[0].cond_kV.shape[-1]
    map_BlW = images[0].cond_kV.new_zeros(len(images), run.scale.num_tokens, width)
    for map_lW, image in zip(map_BlW, images, strict=True):
        both = image.both()
        if both is not None:
            index = image.index_k
            if image.uncond_index_u is not None:
                index = image.uncond_index_u if index is None else index[image.uncond_index_u]
            map_lW[slice(None) if index is None else index] = both[0] - both[1]
    return Difference(grid=run.scale.grid, map_BlW=map_BlW)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts behind each other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
