"""The trace of a scale, counted from the token lists that its blocks ran.

Axes: B images, l tokens of the scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.core.cost import Row, RowWork, ScaleWork
from foveate.core.trace import ScaleTrace
from foveate.engine.scale_run import Active, ScaleRun


def trace_of(run: ScaleRun, refined: Mapping[Row, int]) -> ScaleTrace:
    """What ran, counted from the lists of tokens that the blocks were given; its time is filled in by the loop.

    Args:
        run: The scale, behind its blocks.
        refined: Tokens that the refiner read, by row.
    """
    if not run.plan.runs:
        work = ScaleWork(scale=run.scale.index, grid_tokens=0, rows={}, evicted=run.plan.evict)
        return ScaleTrace(scale=run.scale.index, grid=run.scale.grid, ran=False, work=work)
    num_blocks, parts = run.state.trace.shape.num_blocks, len(run.state.trace.shape.sublayer_flops)
    blocks = [run.block_counts(block) for block in range(num_blocks)]
    narrowed = {b: [by.get(s, blocks[b]) for s in range(parts)] for b, by in run.narrowed.items()}
    headed = run.headed
    rows = {
        row: RowWork(
            block_tokens=tuple(counts[r] for counts in blocks),
            head_tokens=headed[r],
            refined_tokens=refined.get(row, 0),
            attended_twice=run.attended_twice,
            sublayer_tokens={b: tuple(counts[r] for counts in by) for b, by in narrowed.items()},
        )
        for r, row in enumerate(run.live)
    }
    dtype = next((part.dtype for part in run.plan.dtypes if part.dtype != run.dtype), None)
    keep_Bl, depth_Bl = _maps(run)
    return ScaleTrace(
        scale=run.scale.index,
        grid=run.scale.grid,
        ran=True,
        work=ScaleWork(scale=run.scale.index, grid_tokens=run.scale.num_tokens, rows=rows, evicted=run.plan.evict),
        narrow_dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        keep_Bl=keep_Bl,
        depth_Bl=depth_Bl,
    )


def _maps(run: ScaleRun) -> tuple[Tensor | None, Tensor | None]:
    """Kept tokens and depths of the conditional rows, on the host, if asked for: maps wait for the device."""
    if not run.state.request.wants_maps:
        return None, None
    depth_n = torch.zeros(run.rows.total, dtype=torch.long, device=run.state.f_hat_BZHW.device)
    for block in range(run.state.trace.shape.num_blocks):
        index_n = run.active(block).index_n
        depth_n[slice(None) if index_n is None else index_n] += 1
    depth_Bl = run.on_grid(depth_n[:, None], Active(rows=run.rows, index_n=None))[..., 0].cpu()
    keep_Bl = run.committed()
    return torch.ones_like(depth_Bl, dtype=torch.bool) if keep_Bl is None else keep_Bl.cpu().clone(), depth_Bl
