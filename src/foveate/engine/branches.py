"""Conditional and unconditional rows: splitting packed outputs and combining the branches.

Rows are ordered: all conditional ones, then the unconditional ones that still run.
Axes: n packed tokens, k tokens of one row, C width, V outputs.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.rows import Rows


def split_rows(packed_nV: Float[Tensor, "n V"], live: Sequence[Row], rows: Rows) -> dict[Row, Float[Tensor, "_k V"]]:
    """Each row's part of a packed list."""
    return dict(zip(live, packed_nV.split(rows.counts), strict=True))


def combine_logits(
    logits: Mapping[Row, Float[Tensor, "_k V"]], weight: float, temperature: float
) -> list[Float[Tensor, "_k V"]]:
    """Guided logits of each image, over the temperature; conditional ones where the other branch does not run."""
    guided = []
    for image in sorted(image for image, is_cond in logits if is_cond):
        cond_kV = logits[(image, True)] * (1 / temperature)
        uncond = logits.get((image, False))
        if weight == 1.0 or uncond is None:
            guided.append(cond_kV)
        else:
            guided.append(weight * cond_kV + (1 - weight) * (uncond * (1 / temperature)))
    return guided


def combine_hidden(x_nC: Float[Tensor, "n C"], live: Sequence[Row], rows: Rows, weight: float) -> Float[Tensor, "n C"]:
    """Replaces the hidden states of both branches by their combination, where both run; a new tensor."""
    parts = dict(zip(live, x_nC.split(rows.counts), strict=True))
    for image in {image for image, is_cond in live if not is_cond}:
        if weight != 1.0:
            mixed_kC = weight * parts[(image, True)] + (1 - weight) * parts[(image, False)]
            parts[(image, True)] = parts[(image, False)] = mixed_kC
    return torch.cat([parts[row] for row in live])
