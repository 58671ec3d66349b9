"""From symbols to what a scale adds to the latent: weight times the code where a token ran, the base elsewhere.

Axes: B images, l tokens of the scale, k tokens that ran, d symbols, Z latent channels, (y, x) the scale's latent grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.plan import Base, Spread
from foveate.core.protocols import ScaleTokenizer
from foveate.core.schedule import Grid
from foveate.engine.fills import nearest_ran
from foveate.engine.scale_run import ScaleRun


def residual_of(
    run: ScaleRun,
    symbols: Sequence[Tensor],
    tokenizer: ScaleTokenizer,
    soft_Bld: Float[Tensor, "B l d"] | None = None,
) -> tuple[Float[Tensor, "B Z y x"], Tensor | None]:
    """The residual of a scale, and how many tokens copied from one that did not run (a number on the device, or None).

    Args:
        run: The scale.
        symbols: Per image, of the tokens that ran.
        tokenizer: Looks codes up.
        soft_Bld: Where the plan spreads logits, soft bits of all tokens.
    """
    plan, grid, keep_Bl, kept = run.plan, run.scale.grid, run.committed(), run.kept_images()
    if keep_Bl is None or kept is None:
        residual_BZyx = tokenizer.residual(torch.stack(list(symbols)), grid)
        if plan.weight_Bl is None:
            return residual_BZyx, None
        return residual_BZyx * _on_latents(plan.weight_Bl, grid, residual_BZyx), None
    if soft_Bld is None:
        full_Bld = symbols[0].new_zeros(len(symbols), run.scale.num_tokens, symbols[0].shape[-1])
        for full_ld, index_k, symbols_kd in zip(full_Bld, kept, symbols, strict=True):
            full_ld[index_k] = symbols_kd
    else:
        full_Bld = soft_Bld
    source_Bl, lost_Bl = _sources(run, keep_Bl)
    if source_Bl is not None:
        full_Bld = full_Bld.gather(1, source_Bl[..., None].expand_as(full_Bld))
    codes_BZyx = tokenizer.residual(full_Bld, grid)
    base_BZyx = _base(run, codes_BZyx, lost_Bl)
    ran_BZyx = codes_BZyx
    if plan.weight_Bl is not None:
        ran_BZyx = codes_BZyx * _on_latents(plan.weight_Bl, grid, codes_BZyx)
    residual_BZyx = torch.where(_on_latents(keep_Bl, grid, codes_BZyx), ran_BZyx, base_BZyx)
    return residual_BZyx, None if lost_Bl is None else lost_Bl.sum()


def _base(run: ScaleRun, codes_BZyx: Tensor, lost_Bl: Tensor | None) -> Float[Tensor, "B Z y x"]:
    """What the residual holds where no token ran; `codes_BZyx` are copies or soft there, if the plan says so."""
    plan, grid = run.plan, run.scale.grid
    base_BZyx = torch.zeros_like(codes_BZyx)
    if plan.base is Base.PREVIOUS and run.state.residual_BZhw is not None:
        base_BZyx = F.interpolate(run.state.residual_BZhw, size=codes_BZyx.shape[-2:], mode="nearest")
    elif plan.base in (Base.NEAREST, Base.COPY) or isinstance(plan.base, Spread):
        base_BZyx = codes_BZyx
    if lost_Bl is not None:
        base_BZyx = torch.where(_on_latents(lost_Bl, grid, codes_BZyx), 0.0, base_BZyx)
    if plan.base_weight_Bl is not None:
        base_BZyx = base_BZyx * _on_latents(plan.base_weight_Bl, grid, codes_BZyx)
    return base_BZyx


def _sources(run: ScaleRun, keep_Bl: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For every token the one whose code it commits, and the tokens whose source did not run; None if none copies."""
    if run.plan.base is Base.NEAREST:
        return nearest_ran(keep_Bl, run.scale.grid), None
    if run.plan.base is not Base.COPY or run.plan.source_Bl is None:
        return None, None
    own_l = torch.arange(keep_Bl.shape[-1], device=keep_Bl.device)
    source_Bl = torch.where(keep_Bl, own_l, run.plan.source_Bl)
    return source_Bl, ~keep_Bl.gather(1, source_Bl)


def _on_latents(map_Bl: Tensor, grid: Grid, latents_BZyx: Tensor) -> Tensor:
    """A per-token map as (B, 1, y, x) on the latent grid behind the tokens; one number for all tokens stays one."""
    if map_Bl.shape[-1] == 1:
        return map_Bl[..., None, None]
    map_B1hw = map_Bl.unflatten(-1, grid)[:, None]
    patch = latents_BZyx.shape[-2] // grid[0]
    return map_B1hw.repeat_interleave(patch, -2).repeat_interleave(patch, -1) if patch > 1 else map_B1hw
