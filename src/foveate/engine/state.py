"""All state of one request; it dies with the request, also after an exception or a cancel.

Axes: B images, R rows, Z latent channels, (H, W) the last latent grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.conditions import Condition, num_text_tokens
from foveate.core.cost import ModelShape, Row
from foveate.core.errors import PlanConflictError
from foveate.core.guidance import GuidanceSchedule
from foveate.core.held import held_bytes
from foveate.core.plan import Bound, ScalePlan
from foveate.core.protocols import NextScaleModel, Prepared, ScaleTokenizer
from foveate.core.schedule import Scale, ScaleSchedule
from foveate.core.signals import Signals
from foveate.core.trace import Trace
from foveate.engine.clock import Clock
from foveate.engine.deltas import DeltaStore
from foveate.engine.graphs import Graphs, Prefix, PrefixShape
from foveate.engine.kv_cache import KVCache
from foveate.engine.recorder import Recorder
from foveate.engine.sample import Filter, Sampler
from foveate.engine.select import TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """What shall be generated: B images of one size.

    `conditions` has one entry per image, followed by as many negative ones if there are any. One temperature and one
    filter per scale. Without `times_scales` a GPU is not waited for after every scale, and the times of its scales are
    known when the last one has run.
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
    """

    capacities: tuple[int, ...]
    scratch_tokens: int
    num_rows: int
    num_stored: int

    def kv_bytes(self, width: int, bytes_per_element: int) -> int:
        """Bytes of the cache; `width` is heads times head width."""
        behind = max(self.capacities, default=0) + self.scratch_tokens
        return 2 * self.num_rows * width * bytes_per_element * (sum(self.capacities) + behind)


def ceiling_tokens(plan: ScalePlan, num_tokens: int, num_blocks: int) -> list[int]:
    """Tokens per block of one row under a ceiling plan."""
    if not plan.runs:
        return [0] * num_blocks
    keep_Bl = plan.keep(1, num_tokens)
    counts = []
    for block in range(num_blocks):
        active_Bl = plan.active(block)
        run_Bl = torch.ones(1, num_tokens, dtype=torch.bool)
        for mask_Bl in (keep_Bl, active_Bl):
            run_Bl = run_Bl if mask_Bl is None else run_Bl & mask_Bl.to(run_Bl.device)
        counts.append(int(run_Bl[0].sum()))
    return counts


def bounds_of(bound: Bound, request: Request, shape: ModelShape) -> Bounds:
    """What the ceilings of a policy imply for the cache: all scales before the last are stored, or none."""
    plans = [bound.ceiling(s) for s in range(len(request.schedule))]
    last = max((s for s, plan in enumerate(plans) if plan.runs), default=0)
    num_stored = last if shape.is_cached else 0
    per_scale = [
        ceiling_tokens(plan, scale.num_tokens, shape.num_blocks)
        for plan, scale in zip(plans, request.schedule.scales, strict=True)
    ]
    stored = [sum(per_scale[s][block] for s in range(num_stored)) for block in range(shape.num_blocks)]
    branches = 2 if request.guidance.is_needed(0) else 1
    return Bounds(
        capacities=tuple(stored),
        scratch_tokens=max(max(counts) for counts in per_scale[num_stored:]),
        num_rows=branches * request.num_images,
        num_stored=num_stored,
    )


@dataclass(kw_only=True, slots=True)
class RequestState:
    """What changes while a request runs."""

    live: list[Row]
    prepared: Prepared
    cache: KVCache
    deltas: DeltaStore
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    policy: Any
    trace: Trace
    clock: Clock
    num_stored: int
    prepared_bytes: int
    prefix: Prefix | None = None
    residual_BZhw: Tensor | None = None
    signals: Signals | None = None
    dropped: set[int] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        model: NextScaleModel,
        tokenizer: ScaleTokenizer,
        bound: Bound,
        request: Request,
        clock: Clock,
        graphs: Graphs | None = None,
    ) -> "RequestState":
        """Allocates everything, at the bound; the clock runs."""
        is_guided = request.guidance.is_needed(0)
        conditions = request.conditions if is_guided else request.conditions[: request.num_images]
        prepared = model.prepare(conditions, is_guided and not request.has_negative)
        text_tokens = request.text_tokens()
        live = list(text_tokens)
        device = model.device
        limits = bounds_of(bound, request, model.shape)
        cache = KVCache(model.shape, len(live), limits.capacities, limits.scratch_tokens, model.compute_dtype, device)
        last_grid = request.schedule.latent_grid(len(request.schedule) - 1)
        return cls(
            live=live,
            prepared=prepared,
            cache=cache,
            deltas=DeltaStore(model.shape.num_blocks),
            f_hat_BZHW=torch.zeros(request.num_images, tokenizer.latent_channels, *last_grid, device=device),
            policy=bound.start(),
            trace=Trace(
                shape=model.shape,
                text_tokens=text_tokens,
                bytes_per_element=torch.empty(0, dtype=model.compute_dtype).element_size(),
                peak_kv_bytes=cache.num_bytes,
            ),
            clock=clock,
            num_stored=limits.num_stored,
            prepared_bytes=held_bytes(prepared),
            prefix=None if graphs is None else _lease(graphs, model, request, limits.num_stored, prepared),
        )

    def settle_branches(self, plan: ScalePlan, guidance: GuidanceSchedule, scale: int) -> None:
        """Releases every unconditional row that the plan stops or that guidance no longer needs.

        Raises:
            PlanConflictError: The plan asks for a branch that an earlier plan dropped.
        """
        wanted = (True,) if plan.unconditional is None else plan.unconditional
        images = {image for image, _ in self.live}
        asked = {i for i in images if wanted[i % len(wanted)]}
        is_needed = guidance.is_needed(scale)
        if plan.runs and is_needed and asked & self.dropped:
            image = min(asked & self.dropped)
            raise PlanConflictError(
                f"scale {scale}: a dropped unconditional branch cannot return, image {image}; "
                "drop it at every later scale, too"
            )
        if is_needed:
            self.dropped |= images - asked
            self.trace.stopped = frozenset(self.dropped)
        stopped = images - asked if is_needed else images
        keep = [r for r, (image, is_cond) in enumerate(self.live) if is_cond or image not in stopped]
        # A scale that does not run reads no row: what may be the last one would only move memory.
        if plan.runs and len(keep) < len(self.live):
            self._keep(keep)

    def cache_bytes(self) -> int:
        """Bytes kept for later scales beside keys and values."""
        return self.prepared_bytes + held_bytes(self.deltas.blocks)

    def prefix_for(self, scale: Scale, layout: TokenLayout, recorder: Recorder) -> Prefix | None:
        """The captured prefix if this scale is the next one of it; else it ends, and None."""
        if self.prefix is not None and (not self.prefix.serves(scale) or not layout.is_dense or recorder.is_on):
            self._leave_prefix()
        return self.prefix

    def release(self) -> None:
        """Gives back what another request may use."""
        if self.prefix is not None:
            self.prefix.release()

    def _leave_prefix(self) -> None:
        """From here on the plain loop runs, with the keys and values so far."""
        if self.prefix is not None:
            self.prefix.hand_over(self.cache)
            self.prefix = None

    def _keep(self, rows: Sequence[int]) -> None:
        self._leave_prefix()
        self.live = [self.live[r] for r in rows]
        self.prepared = self.prepared.keep(rows)
        self.prepared_bytes = held_bytes(self.prepared)
        self.cache.keep(rows)
        self.deltas.keep(rows)


def _lease(
    graphs: Graphs, model: NextScaleModel, request: Request, num_stored: int, prepared: Prepared
) -> Prefix | None:
    """A captured prefix for a request, unless it combines the branches inside the blocks."""
    if request.guidance.hidden_blocks:
        return None
    shape = PrefixShape(
        schedule=request.schedule,
        rows=tuple(request.text_tokens().items()),
        num_stored=num_stored,
        dtype=model.compute_dtype,
    )
    return graphs.lease(shape, model, prepared)
