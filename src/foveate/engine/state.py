"""All state of one request; freed with the request, also after an exception or a cancel.

Axes: B images, R rows, Z latent channels, (H, W) the last latent grid.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.conditions import Condition, num_text_tokens
from foveate.core.cost import ModelShape, Row
from foveate.core.guidance import GuidanceSchedule
from foveate.core.held import held_bytes
from foveate.core.plan import KeepDifference, KeepOutputs, ScalePlan, Unit, narrowed
from foveate.core.plan_checker import PlanChecker
from foveate.core.policy import Bound
from foveate.core.protocols import NextScaleModel, PrefixTokens, Prepared, ScaleTokenizer
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Signals
from foveate.core.trace import Trace
from foveate.engine.clock import Clock, clock_of
from foveate.engine.fills import Difference, Fills
from foveate.engine.graphs import Graphs, Prefix, PrefixShape
from foveate.engine.kv_cache import KVCache
from foveate.engine.sample import Filter, Sampler


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """What is to be generated: B images of one size.

    `conditions` has one entry per image, followed by as many negative ones if there are any. One temperature and one
    filter per scale. Without `times_scales` a GPU is not waited for after every scale, and the times of its scales are
    known when the last one has run. `remaining_ms` is asked before every scale but the first how much time is left.
    """

    schedule: ScaleSchedule
    guidance: GuidanceSchedule
    temperatures: tuple[float, ...]
    filters: tuple[Filter, ...]
    sampler: Sampler
    conditions: tuple[Condition, ...]
    num_images: int
    wants_maps: bool = False
    times_scales: bool = False
    remaining_ms: Callable[[int], float] | None = None

    @property
    def has_negative(self) -> bool:
        """Whether the conditions hold negative ones."""
        return len(self.conditions) > self.num_images

    def text_tokens(self) -> dict[Row, int]:
        """Text tokens of every row that exists at the start; a learned unconditional row is as long as its prompt."""
        lengths = [num_text_tokens(condition) for condition in self.conditions]
        rows: dict[Row, int] = {(image, True): lengths[image] for image in range(self.num_images)}
        if self.guidance.is_needed(0):
            first = self.num_images if self.has_negative else 0
            rows |= {(image, False): lengths[first + image] for image in range(self.num_images)}
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What a request needs at most, known before it runs: tokens per block that a row stores, and beside them.

    The first `num_stored` scales are stored; each later one has its keys in the scratch only while it runs.
    `fill_values` are the numbers kept for fills at once, in the compute dtype; `difference_values` those of a cached
    difference of the branches, float32.
    """

    capacities: tuple[int, ...]
    scratch_tokens: int
    num_rows: int
    num_stored: int
    fill_values: int = 0
    difference_values: int = 0

    def kv_bytes(self, width: int, bytes_per_element: int) -> int:
        """Bytes of the cache; `width` is heads times head width."""
        behind = max(self.capacities, default=0) + self.scratch_tokens
        return 2 * self.num_rows * width * bytes_per_element * (sum(self.capacities) + behind)

    def fill_bytes(self, bytes_per_element: int) -> int:
        """Bytes of what is kept for fills and for a cached difference."""
        return self.fill_values * bytes_per_element + 4 * self.difference_values


def ceiling_tokens(plan: ScalePlan, num_tokens: int, num_blocks: int, *, is_cond: bool = True) -> list[int]:
    """Tokens per block of one row under a ceiling plan."""
    if not plan.runs:
        return [0] * num_blocks
    keep_Bl = plan.keep(1, num_tokens)
    if not is_cond:
        keep_Bl = narrowed(plan.unconditional_tokens, keep_Bl, 1, num_tokens)
    counts = []
    for block in range(num_blocks):
        active_Bl = plan.active(block)
        run_Bl = torch.ones(1, num_tokens, dtype=torch.bool, device="cpu")
        for mask_Bl in (keep_Bl, active_Bl):
            run_Bl = run_Bl if mask_Bl is None else run_Bl & mask_Bl.to(run_Bl.device)
        counts.append(int(run_Bl[0].sum()))
    return counts


def bounds_of(bound: Bound, request: Request, shape: ModelShape, prefix_tokens: int = 0) -> Bounds:
    """What the ceilings of a policy imply: all scales before the last are stored, or none; less what is evicted."""
    choices = [bound.ceilings(s) for s in range(len(request.schedule))]
    last = max((s for s, plans in enumerate(choices) if any(plan.runs for plan in plans)), default=0)
    num_stored = last if shape.is_cached else 0
    per_scale = [
        _most_run(plans, scale.num_tokens, shape.num_blocks)
        for plans, scale in zip(choices, request.schedule.scales, strict=True)
    ]
    evicted = [frozenset.intersection(*(frozenset(plan.evict) for plan in plans)) for plans in choices]
    branches = 2 if request.guidance.is_needed(0) else 1
    num_rows = branches * request.num_images
    is_prefixed = prefix_tokens if num_stored else 0
    return Bounds(
        capacities=tuple(is_prefixed + _most_stored(evicted, [c[b] for c in per_scale], num_stored)
                         for b in range(shape.num_blocks)),
        scratch_tokens=max(max(counts) for counts in per_scale[num_stored:]) + prefix_tokens * (num_stored == 0),
        num_rows=num_rows,
        num_stored=num_stored,
        fill_values=num_rows * shape.width * _most_kept(bound, request.schedule, shape),
        difference_values=request.num_images * _difference_width(shape) * _most_differences(bound, request.schedule),
    )  # fmt: skip


def _most_run(plans: Sequence[ScalePlan], num_tokens: int, num_blocks: int) -> list[int]:
    """Tokens per block of one row under the ceiling that runs most of them there."""
    counts = [ceiling_tokens(plan, num_tokens, num_blocks) for plan in plans]
    return [
        max(plan.sublayer_count(block, own[block]) for plan, own in zip(plans, counts, strict=True))
        for block in range(num_blocks)
    ]


def _most_stored(evicted: Sequence[Set[int]], counts: Sequence[int], num_stored: int) -> int:
    """The most tokens that a block's cache holds at once."""
    held: dict[int, int] = {}
    most = 0
    for scale in range(num_stored):
        held[scale] = counts[scale]
        most = max(most, sum(held.values()))
        for gone in evicted[scale]:
            held.pop(gone, None)
    return most


def _most_kept(bound: Bound, schedule: ScaleSchedule, shape: ModelShape) -> int:
    """Tokens times units whose outputs are held at once, at the most: those kept, and those of the running scale."""
    kept = most = 0
    for scale in schedule.scales:
        units = sum(_num_units(keep, shape) for keep in bound.keeps(scale.index) if isinstance(keep, KeepOutputs))
        if units:
            most = max(most, kept + units * scale.num_tokens)
            kept = units * scale.num_tokens
    return most


def _num_units(keep: KeepOutputs, shape: ModelShape) -> int:
    blocks = shape.num_blocks if keep.blocks is None else len(keep.blocks)
    return blocks * (len(shape.sublayer_flops) if keep.unit is Unit.SUBLAYER else 1)


def _most_differences(bound: Bound, schedule: ScaleSchedule) -> int:
    """Tokens of the cached difference that is held, and of the one that replaces it."""
    kept = [scale.num_tokens for scale in schedule.scales if KeepDifference() in bound.keeps(scale.index)]
    return sum(sorted(kept)[-2:])


def _difference_width(shape: ModelShape) -> int:
    """Numbers per token of a cached difference: of the head's outputs or of its inputs, whichever are fewer."""
    return min(shape.width, shape.head_outputs)


@dataclass(kw_only=True, slots=True, eq=False)
class RequestState:
    """What changes while a request runs; a scale changes it in one step, at its end."""

    bound: Bound
    request: Request
    checker: PlanChecker
    limits: Bounds
    live: tuple[Row, ...]
    prepared: Prepared
    prefix: PrefixTokens | None
    cache: KVCache
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    policy: Any
    trace: Trace
    clock: Clock
    refining: Clock
    prepared_bytes: int
    fills: Fills = field(default_factory=Fills)
    difference: Difference | None = None
    scale: int = 0
    graph: Prefix | None = None
    residual_BZhw: Tensor | None = None
    signals: Signals | None = None
    dropped: frozenset[int] = frozenset()
    shares: list[int] = field(default_factory=list)
    lost: list[Tensor | None] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    joined: tuple[tuple[Prepared, ...], Prepared] | None = None

    @classmethod
    def open(
        cls, model: NextScaleModel, tokenizer: ScaleTokenizer, bound: Bound, request: Request, graphs: Graphs | None
    ) -> "RequestState":
        """Allocates everything, at the bound."""
        clock = clock_of(model.device, request.times_scales)
        clock.start()
        is_guided = request.guidance.is_needed(0)
        conditions = request.conditions if is_guided else request.conditions[: request.num_images]
        prepared = model.prepare(conditions, is_guided and not request.has_negative)
        prefix = model.prefix(prepared)
        text_tokens = request.text_tokens()
        device, num_scales = model.device, len(request.schedule)
        limits = bounds_of(bound, request, model.shape, 0 if prefix is None else max(prefix.counts))
        cache = KVCache(
            model.shape, len(text_tokens), limits.capacities, limits.scratch_tokens, model.compute_dtype, device
        )
        last_grid = request.schedule.latent_grid(num_scales - 1)
        state = cls(
            bound=bound,
            request=request,
            checker=PlanChecker(
                policy=bound.label,
                num_images=request.num_images,
                num_blocks=model.shape.num_blocks,
                num_scales=num_scales,
            ),
            limits=limits,
            live=tuple(text_tokens),
            prepared=prepared,
            prefix=prefix,
            cache=cache,
            f_hat_BZHW=torch.zeros(
                request.num_images, tokenizer.latent_channels, *last_grid, dtype=torch.float32, device=device
            ),
            policy=bound.start(),
            trace=Trace(
                shape=model.shape,
                text_tokens=text_tokens,
                bytes_per_element=model.compute_dtype.itemsize,
                peak_kv_bytes=cache.num_bytes,
            ),
            clock=clock,
            refining=clock_of(model.device, request.times_scales),
            prepared_bytes=held_bytes(prepared),
            graph=None if graphs is None else _lease(graphs, model, request, limits.num_stored, prepared),
        )
        clock.stop()
        return state

    @property
    def is_done(self) -> bool:
        """Whether all scales have been reached."""
        return self.scale == len(self.request.schedule)

    def signals_before(self, scale: int) -> Signals | None:
        """What a scale is planned from: what the latest one left behind, and the time that is left."""
        if self.signals is None or self.request.remaining_ms is None:
            return self.signals
        return replace(self.signals, remaining_ms=self.request.remaining_ms(scale))

    def cache_bytes(self) -> int:
        """Bytes kept for later scales beside keys and values."""
        return self.prepared_bytes + held_bytes((self.fills, self.difference))

    def leave_graph(self) -> None:
        """From here on the plain loop runs, with the keys and values so far."""
        if self.graph is not None:
            self.graph.hand_over(self.cache)
            self.graph = None

    def release(self) -> None:
        """Gives back what another request may use."""
        if self.graph is not None:
            self.graph.release()


def _lease(
    graphs: Graphs, model: NextScaleModel, request: Request, num_stored: int, prepared: Prepared
) -> Prefix | None:
    """A captured prefix for a request, unless it combines the branches inside the blocks or holds a text in front."""
    if request.guidance.hidden_blocks or model.shape.has_text_prefix:
        return None
    shape = PrefixShape(
        schedule=request.schedule,
        rows=tuple(request.text_tokens().items()),
        num_stored=num_stored,
        dtype=model.compute_dtype,
    )
    return graphs.lease(shape, model, prepared)
