"""Values of the tokens that ran, spread over the map: what a token that did not run draws, and what guides it.

A neighbour's weight falls with its distance and with how unlike its input is: w = exp(-|x - y|^2 / (2 sigma^2))
exp(-|f(x) - f(y)|^2 / (2 likeness^2 V)), with f the scale's input map and V the mean of |f - mean f|^2. A token that
draws from spread logits uses its own random number, softly. How far to trust what was spread is measured on the tokens
that ran, each from those around it.
Ours. Every image is computed by itself. Axes: B images, l tokens of a scale, k those that ran, d bits of a token,
Z channels of the input, W values of a token.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import PlanConflictError
from foveate.core.plan import Spread
from foveate.core.protocols import ScaleTokenizer
from foveate.core.schedule import Grid
from foveate.core.transfer import to_device
from foveate.engine.sample import Filter
from foveate.engine.scale_run import ScaleRun
from foveate.kernels.bits import keep_two

REACH = 3
"""Grid steps in each direction within which neighbours count."""

_LEAST = 1e-30
"""A variance that divides is no smaller, so that its inverse is finite."""

_OFFSETS = [(dy, dx) for dy in range(REACH + 1) for dx in range(-REACH, REACH + 1) if (dy, dx) > (0, 0)]
"""One of each pair of opposite offsets."""


def spread(
    values_kW: Float[Tensor, "k W"],
    index_k: Int[Tensor, " k"],
    input_Zhw: Float[Tensor, "Z h w"],
    sigma: float,
    likeness: float,
) -> tuple[Float[Tensor, "l W"], Float[Tensor, " l"]]:
    """Weighted means of the values around every token, itself left out, and the sums of the weights.

    Where the sum is zero, so is the mean. Never waits for the device.

    Args:
        values_kW: Of the tokens that ran.
        index_k: Their places.
        input_Zhw: What the transformer reads before the scale.
        sigma: In grid steps, above 0.
        likeness: Above 0.
    """
    grid = (input_Zhw.shape[-2], input_Zhw.shape[-1])
    width = values_kW.shape[-1]
    # The last channel holds 1 where a token ran, so that means and weights come from the same sums.
    known_Mhw = values_kW.new_zeros(width + 1, grid[0] * grid[1], dtype=torch.float32)
    known_Mhw[:width, index_k] = values_kW.float().T
    known_Mhw[width, index_k] = 1.0
    known_Mhw = known_Mhw.unflatten(-1, grid)
    total_Mhw = torch.zeros_like(known_Mhw)
    unlike = _per_unlikeness(input_Zhw, likeness)
    for dy, dx in _OFFSETS:
        here, there = _overlap(grid, dy, dx)
        if known_Mhw[here].numel() == 0:
            continue
        unlike_hw = (input_Zhw[here] - input_Zhw[there]).square().sum(0) * unlike
        weight_hw = (-unlike_hw - (dy * dy + dx * dx) / (2 * sigma * sigma)).exp()
        total_Mhw[here] += weight_hw * known_Mhw[there]
        total_Mhw[there] += weight_hw * known_Mhw[here]
    weight_l = total_Mhw[width].flatten()
    mean_Wl = total_Mhw[:width].flatten(1) / weight_l.clamp(min=torch.finfo(torch.float32).tiny)
    return mean_Wl.T, weight_l


def _per_unlikeness(input_Zhw: Float[Tensor, "Z h w"], likeness: float) -> Float[Tensor, ""]:
    """1 / (2 likeness^2 V); 0 where the input is the same everywhere."""
    around_Zhw = input_Zhw - input_Zhw.mean((1, 2), keepdim=True)
    variance = around_Zhw.square().sum(0).mean()
    factor = 1 / (2 * likeness * likeness * variance.clamp(min=_LEAST))
    return torch.where(variance > 0, factor, 0.0)


def _overlap(grid: Grid, dy: int, dx: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The tokens that have one (dy, dx) steps further in the grid, and those; as slices of (..., h, w)."""
    rows = max(grid[0] - dy, 0)
    left, columns = max(-dx, 0), max(grid[1] - abs(dx), 0)
    here = (slice(None), slice(0, rows), slice(left, left + columns))
    there = (slice(None), slice(dy, dy + rows), slice(left + dx, left + dx + columns))
    return here, there


def thresholds_of(run: ScaleRun, num_bits: int) -> list[Float[Tensor, "l d"]] | None:
    """Per image, what each bit of the map is drawn against; None unless the plan spreads logits to some token.

    Raises:
        PlanConflictError: The sampler draws nothing.
    """
    if not isinstance(run.plan.base, Spread) or run.kept_images() is None:
        return None
    request, scale = run.state.request, run.scale
    thresholds = request.sampler.thresholds(scale.index, scale.grid, request.num_images, num_bits)
    if thresholds is None:
        raise PlanConflictError(
            f"{run.state.bound.label}: spread logits are drawn against a token's own random numbers, and this sampler "
            "has none; use one that draws"
        )
    return [to_device(threshold_ld, run.state.f_hat_BZHW.device) for threshold_ld in thresholds]


def soft_bits(
    run: ScaleRun,
    logits: Sequence[Float[Tensor, "_k d 2"]],
    bits: Sequence[Int[Tensor, "_k d"]],
    thresholds: Sequence[Float[Tensor, "l d"]],
    tokenizer: ScaleTokenizer,
) -> Float[Tensor, "B l d"]:
    """The bits of every token as shares of 1: drawn where it ran, soft elsewhere.

    Args:
        run: The scale.
        logits: Per image, of the tokens that ran, after guidance and temperature.
        bits: What these drew.
        thresholds: Of `thresholds_of`.
        tokenizer: Says what the transformer read before the scale.
    """
    word, kept = run.plan.base, run.kept_images()
    assert isinstance(word, Spread), "the caller asked for thresholds"
    assert kept is not None, "as above"
    rule = run.state.request.filters[run.scale.index]
    input_BZhw = tokenizer.next_input(run.state.f_hat_BZHW, run.scale.grid)
    parts = zip(logits, bits, thresholds, kept, input_BZhw, strict=True)
    return torch.stack([_soft_bits(word, rule, *part) for part in parts])


def _soft_bits(
    word: Spread,
    rule: Filter,
    logits_kd2: Float[Tensor, "k d 2"],
    bits_kd: Int[Tensor, "k d"],
    threshold_ld: Float[Tensor, "l d"],
    index_k: Int[Tensor, " k"],
    input_Zhw: Float[Tensor, "Z h w"],
) -> Float[Tensor, "l d"]:
    logits_kd2 = logits_kd2.float()
    logit_ld, weight_l = spread(logits_kd2[..., 1] - logits_kd2[..., 0], index_k, input_Zhw, word.sigma, word.likeness)
    if rule.top_p > 0 and not rule.is_greedy:
        pair_ld2 = keep_two(torch.stack((torch.zeros_like(logit_ld), logit_ld), -1), rule.top_p)
        logit_ld = pair_ld2[..., 1] - pair_ld2[..., 0]
    number_ld = torch.zeros_like(threshold_ld) if rule.is_greedy else threshold_ld
    sign_ld = ((logit_ld - number_ld) / (2 * word.softness)).tanh()
    sign_ld = torch.where(weight_l[:, None] > 0, sign_ld, 0.0)
    drawn_kd = bits_kd.float()
    soft_ld = (1 + confidence(2 * drawn_kd - 1, sign_ld[index_k]) * sign_ld) / 2
    soft_ld[index_k] = drawn_kd
    return soft_ld


def confidence(true_kW: Float[Tensor, "k W"], estimate_kW: Float[Tensor, "k W"]) -> Float[Tensor, ""]:
    """The factor in [0, 1] that brings estimates nearest to what they estimate; 0 where they are all zero."""
    # In float64, and image by image: the same alone and in a batch.
    true_kW, estimate_kW = true_kW.double(), estimate_kW.double()
    agreed, size = (true_kW * estimate_kW).sum(), estimate_kW.square().sum()
    return torch.where(size > 0, agreed / size.clamp(min=_LEAST), 0.0).clamp(0, 1).float()
