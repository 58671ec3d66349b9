"""What a request will cost, from the ceilings of its plans, before anything runs; and what running everything costs.

Equal to what the trace counts for static policies, an upper bound for those that look at the content.
"""

from collections.abc import Sequence
from dataclasses import replace

from foveate.core.cost import Cost, ModelShape, RowWork, ScaleWork, flops_by_image, request_cost
from foveate.core.plan import Keep, KeepDifference, ScalePlan, narrowed
from foveate.core.policy import Bound
from foveate.core.schedule import Scale
from foveate.core.signals import AttentionEntropy, Record, Signal
from foveate.engine.state import Request, ceiling_tokens


def planned_work(
    plans: Sequence[ScalePlan],
    recorded: Sequence[frozenset[Record | Keep]],
    request: Request,
    shape: ModelShape,
) -> tuple[ScaleWork, ...]:
    """What plans make every row run.

    Args:
        plans: One per scale; selections for one image stand for all.
        recorded: Per scale, the signals that are recorded and what is kept.
        request: Sizes, guidance and rows.
        shape: Of the model.
    """
    text_tokens = request.text_tokens()
    live = list(text_tokens)
    work = []
    for plan, scale, records in zip(plans, request.schedule.scales, recorded, strict=True):
        wanted = plan.unconditional
        is_needed = request.guidance.is_needed(scale.index)
        live = [
            (image, is_cond)
            for image, is_cond in live
            if is_cond or (is_needed and (wanted is None or wanted[image % len(wanted)]))
        ]
        if not plan.runs:
            work.append(ScaleWork(scale=scale.index, grid_tokens=0, rows={}, evicted=plan.evict))
            continue
        reads_both = Signal.LOGITS in records or KeepDifference() in records
        has_head = reads_both or (request.guidance.on_logits and request.guidance.weights[scale.index] != 1.0)
        is_refined = shape.refined_token_flops > 0 and scale.index == len(request.schedule) - 1
        branches = {is_cond: _branch_work(plan, scale, shape, is_cond=is_cond) for is_cond in (True, False)}
        twice = tuple(sorted(record.block for record in records if isinstance(record, AttentionEntropy)))
        rows = {}
        for row in live:
            ahead = shape.prefix_tokens(text_tokens[row]) if scale.index == 0 else 0
            part = branches[row[1]]
            head_tokens = part.head_tokens if row[1] or has_head else 0
            rows[row] = replace(
                part,
                block_tokens=tuple(n + ahead for n in part.block_tokens),
                head_tokens=head_tokens,
                refined_tokens=head_tokens if is_refined else 0,
                attended_twice=twice,
            )
        work.append(ScaleWork(scale=scale.index, grid_tokens=scale.num_tokens, rows=rows, evicted=plan.evict))
    return tuple(work)


def _branch_work(plan: ScalePlan, scale: Scale, shape: ModelShape, *, is_cond: bool) -> RowWork:
    """What a ceiling lets one row of a branch run, a prefix left out."""
    blocks = tuple(ceiling_tokens(plan, scale.num_tokens, shape.num_blocks, is_cond=is_cond))
    keep_Bl = plan.keep(1, scale.num_tokens)
    if not is_cond:
        keep_Bl = narrowed(plan.unconditional_tokens, keep_Bl, 1, scale.num_tokens)
    counts = {block: plan.sublayer_count(block, count) for block, count in enumerate(blocks)}
    parts = len(shape.sublayer_flops)
    return RowWork(
        block_tokens=blocks,
        head_tokens=scale.num_tokens if keep_Bl is None else int(keep_Bl[0].sum()),
        sublayer_tokens={block: (n,) * parts for block, n in counts.items() if n < blocks[block]},
    )


def full_work(request: Request, shape: ModelShape) -> tuple[ScaleWork, ...]:
    """What the request runs if nothing is left out."""
    num_scales = len(request.schedule)
    return planned_work([ScalePlan()] * num_scales, [frozenset()] * num_scales, request, shape)


def full_cost(request: Request, shape: ModelShape, bytes_per_element: int = 4) -> Cost:
    """The cost of `full_work`."""
    return request_cost(full_work(request, shape), shape, request.text_tokens(), bytes_per_element)


def full_flops_by_image(request: Request, shape: ModelShape) -> tuple[int, ...]:
    """FLOPs of every image of `full_work`."""
    return flops_by_image(full_work(request, shape), shape, request.text_tokens())


def forecast(bound: Bound, request: Request, shape: ModelShape, bytes_per_element: int = 4) -> Cost:
    """FLOPs, tokens and stored cache bytes of a request under a policy, before it runs.

    Exact for static policies, an upper bound otherwise.
    """
    return request_cost(forecast_work(bound, request, shape), shape, request.text_tokens(), bytes_per_element)


def forecast_work(bound: Bound, request: Request, shape: ModelShape) -> tuple[ScaleWork, ...]:
    """What every row will run under a policy; exact for static policies, an upper bound otherwise."""
    scales = range(len(request.schedule))
    plans = [bound.ceiling(s) for s in scales]
    recorded = [bound.record(s) | bound.keeps(s) for s in scales]
    return planned_work(plans, recorded, request, shape)
