"""What finished requests cost, beside what they would have cost in full."""

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.cost import ModelShape
from foveate.core.policy import Bound
from foveate.core.trace import Trace
from foveate.core.warnings import CallWarning, WarningCode
from foveate.engine.forecast import full_cost, full_flops_by_image
from foveate.engine.state import Request, bounds_of

WITHOUT_EFFECT: WarningCode = "policy_without_effect"


def without_effect(policy: str, unfired: Sequence[str]) -> tuple[CallWarning, ...]:
    """A warning for each saving of the policy that never happened in this run."""
    return tuple(
        CallWarning(code=WITHOUT_EFFECT, message=f"policy {policy} did not {promise} in this run")
        for promise in unfired
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Milliseconds:
    """Wall-clock time of the parts of a call, and of the whole call; `refiner` is 0 where a family has none."""

    text: float
    transformer: float
    refiner: float = 0.0
    decoder: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a call cost, counted while it ran; text encoder and decoder are not part of the FLOPs.

    `full` stands for the same request with nothing left out; `cache_bytes_peak` is what was kept between scales beside
    keys and values. `unfired` names the policy's directives that had no effect; `notes` says what its settings imply,
    `warnings` what the call did otherwise than one would expect. `latency_budget_ms` is what the call was to take. The
    FLOPs of a family's refiner are part of `flops_run` and `flops_full`; `refiner_flops_run` is its part of the former.
    `flops_full_by_image` adds up to `flops_full`.
    """

    flops_run: int
    flops_full: int
    tokens_run: int
    tokens_full: int
    token_blocks_run: int
    token_blocks_full: int
    kv_bytes_peak: int
    kv_bytes_bound: int
    cache_bytes_peak: int
    ms: Milliseconds
    unfired: tuple[str, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[CallWarning, ...] = ()
    latency_budget_ms: float | None = None
    refiner_flops_run: int = 0
    flops_full_by_image: tuple[int, ...] = ()

    @property
    def late_ms(self) -> float | None:
        """How much longer than its budget the call took; negative where it met it, None without one."""
        return None if self.latency_budget_ms is None else self.ms.total - self.latency_budget_ms

    @property
    def flops_ratio(self) -> float:
        """Run over full, in (0, 1]."""
        return self.flops_run / self.flops_full

    @property
    def predicted_speedup(self) -> float:
        """Full over run: what transformer and refiner gain if time follows FLOPs; nothing was measured."""
        return self.flops_full / self.flops_run


def build_report(
    trace: Trace,
    bound: Bound,
    requests: Sequence[Request],
    ms: Milliseconds,
    warnings: Sequence[CallWarning] = (),
    notes: Sequence[str] = (),
    latency_budget_ms: float | None = None,
) -> Report:
    """What finished requests cost, beside what they would have cost in full.

    Args:
        trace: Of all requests together.
        bound: The policy that all of them obeyed.
        requests: As they were asked.
        ms: Measured by the caller.
        warnings: What the caller has to say of it.
        notes: As well, beside what the policy's settings imply.
        latency_budget_ms: What the call was to take.
    """
    shape, size = trace.shape, trace.bytes_per_element
    run = trace.cost
    full = [full_cost(request, shape, size) for request in requests]
    by_image = [
        flops
        for request, cost in zip(requests, full, strict=True)
        for flops in ([cost.flops] if request.num_images == 1 else full_flops_by_image(request, shape))
    ]
    limits = [bounds_of(bound, request, shape, _prefix_tokens(request, shape)) for request in requests]
    return Report(
        flops_run=run.flops,
        flops_full=sum(cost.flops for cost in full),
        tokens_run=run.tokens,
        tokens_full=sum(cost.tokens for cost in full),
        token_blocks_run=run.token_blocks,
        token_blocks_full=sum(cost.token_blocks for cost in full),
        kv_bytes_peak=trace.peak_kv_bytes,
        kv_bytes_bound=sum(limit.kv_bytes(shape.num_heads * shape.head_width, size) for limit in limits),
        cache_bytes_peak=trace.peak_cache_bytes,
        ms=ms,
        unfired=trace.unfired,
        notes=(*bound.notes, *notes),
        warnings=tuple(warnings),
        latency_budget_ms=latency_budget_ms,
        refiner_flops_run=run.refiner_flops,
        flops_full_by_image=tuple(by_image),
    )


def _prefix_tokens(request: Request, shape: ModelShape) -> int:
    """Tokens of the longest text in front of the first scale."""
    return max(shape.prefix_tokens(tokens) for tokens in request.text_tokens().values())
