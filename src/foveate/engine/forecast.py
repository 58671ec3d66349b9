"""What a request will cost, from the ceilings of its plans, before anything runs; and what running everything costs.

Equal to what the trace counts for static policies, an upper bound for those that look at the content.
"""

from collections.abc import Sequence

from foveate.core.cost import Cost, ModelShape, RowWork, ScaleWork, request_cost
from foveate.core.plan import Bound, ScalePlan
from foveate.core.signals import Signal
from foveate.engine.state import Request, ceiling_tokens


def planned_work(
    plans: Sequence[ScalePlan], heads_both: Sequence[bool], request: Request, num_blocks: int
) -> tuple[ScaleWork, ...]:
    """What plans make every row run.

    Args:
        plans: One per scale; selections for one image stand for all.
        heads_both: Per scale, whether a recorded signal reads the unconditional logits although guidance does not.
        request: Sizes, guidance and rows.
        num_blocks: Of the model.
    """
    live = list(request.text_tokens())
    work = []
    for plan, scale, reads_both in zip(plans, request.schedule.scales, heads_both, strict=True):
        wanted = plan.unconditional
        is_needed = request.guidance.is_needed(scale.index)
        live = [
            (image, is_cond)
            for image, is_cond in live
            if is_cond or (is_needed and (wanted is None or wanted[image % len(wanted)]))
        ]
        if not plan.runs:
            work.append(ScaleWork(scale=scale.index, grid_tokens=0, rows={}))
            continue
        keep_Bl = plan.keep(1, scale.num_tokens)
        kept = scale.num_tokens if keep_Bl is None else int(keep_Bl[0].sum())
        blocks = tuple(ceiling_tokens(plan, scale.num_tokens, num_blocks))
        has_head = reads_both or (request.guidance.on_logits and request.guidance.weights[scale.index] != 1.0)
        rows = {row: RowWork(block_tokens=blocks, head_tokens=kept if row[1] or has_head else 0) for row in live}
        work.append(ScaleWork(scale=scale.index, grid_tokens=scale.num_tokens, rows=rows))
    return tuple(work)


def full_work(request: Request, num_blocks: int) -> tuple[ScaleWork, ...]:
    """What the request runs if nothing is left out."""
    num_scales = len(request.schedule)
    return planned_work([ScalePlan()] * num_scales, [False] * num_scales, request, num_blocks)


def full_cost(request: Request, shape: ModelShape, bytes_per_element: int = 4) -> Cost:
    """The cost of `full_work`."""
    return request_cost(full_work(request, shape.num_blocks), shape, request.text_tokens(), bytes_per_element)


def forecast(bound: Bound, request: Request, shape: ModelShape, bytes_per_element: int = 4) -> Cost:
    """FLOPs, tokens and stored cache bytes of a request under a policy, before it runs.

    Exact for static policies, an upper bound otherwise.
    """
    scales = range(len(request.schedule))
    plans = [bound.ceiling(s) for s in scales]
    heads_both = [Signal.LOGITS in bound.record(s) for s in scales]
    work = planned_work(plans, heads_both, request, shape.num_blocks)
    return request_cost(work, shape, request.text_tokens(), bytes_per_element)
