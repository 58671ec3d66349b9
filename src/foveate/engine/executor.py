"""THE scale loop and the block loop: they obey plans and know no policy, model or tokenizer by name.

Axes: B images, R rows, n packed tokens, l tokens of the scale, C width, V outputs, Z latent channels.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.errors import PlanConflictError, UnsupportedError
from foveate.core.plan import Base, Bound, Fill, ScalePlan
from foveate.core.protocols import Block, BlockContext, NextScaleModel, Prepared, ScaleTokenizer
from foveate.core.rows import Rows
from foveate.core.schedule import Scale
from foveate.core.signals import Signal, Signals
from foveate.core.trace import ScaleTrace, Trace, unfired
from foveate.engine.branches import combine_hidden, combine_logits, split_rows
from foveate.engine.clock import clock_of
from foveate.engine.graphs import Graphs
from foveate.engine.kv_cache import KVCache
from foveate.engine.recorder import Recorder, branch_logits
from foveate.engine.select import Chosen, TokenLayout, choose
from foveate.engine.state import Request, RequestState
from foveate.engine.tally import Tally, skipped
from foveate.kernels.heap import kept_heap
from foveate.kernels.residual import add_gated_


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleStep:
    """What the engine hands out after every scale; `f_hat_BZHW` is the latent so far and is never changed later."""

    scale: int
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LateBlocks:
    """Blocks that run in place of the model's own at the last `num_scales` scales, in another number format."""

    num_scales: int
    blocks: tuple[Block, ...]


class Engine:
    """A model and a tokenizer that obey a bound policy; holds no state of any request."""

    def __init__(
        self,
        model: NextScaleModel,
        tokenizer: ScaleTokenizer,
        graphs: Graphs | None = None,
        late: LateBlocks | None = None,
    ) -> None:
        """Takes the parts.

        Args:
            model: On its device; with graphs it stays there.
            tokenizer: Of the same family.
            graphs: Replays the first scales; None launches everything.
            late: Blocks of the last scales; None takes the model's own at all of them.
        """
        self.model, self.tokenizer, self.graphs, self.late = model, tokenizer, graphs, late

    def run(self, bound: Bound, request: Request) -> Generator[ScaleStep, None, None]:
        """Generates, handing out the latent after every scale.

        Closing the iterator cancels the request; nothing of it remains.

        Raises:
            PlanConflictError: A plan asks for what cannot be done.
        """
        _refuse_equal_branches(bound, request)
        clock = clock_of(self.model.device, request.times_scales)
        clock.start()
        with kept_heap():
            with torch.inference_mode():
                state = RequestState.open(self.model, self.tokenizer, bound, request, clock, self.graphs)
            try:
                for scale in request.schedule.scales:
                    with torch.inference_mode():
                        self._step(state, scale, request, bound)
                    yield ScaleStep(scale=scale.index, f_hat_BZHW=state.f_hat_BZHW, trace=state.trace)
                    clock.start()
            finally:
                state.release()

    def _step(self, state: RequestState, scale: Scale, request: Request, bound: Bound) -> None:
        """Asks for the plan of a scale, obeys it and notes what it took since the clock was started.

        The first scale's time holds what the request prepares once: text keys and values, modulation, the cache. The
        device is read once at most, for counts and branches that its content decides.
        """
        plan, state.policy = bound.plan(scale.index, state.signals, state.policy)
        plan = plan.on(state.f_hat_BZHW.device)
        chosen = choose(plan, request.num_images, scale.num_tokens, self.model.shape.num_blocks)
        state.settle_branches(chosen.plan, request.guidance, scale.index)
        wanted = bound.record(scale.index)
        traced = self._scale(state, chosen, scale, request, wanted) if plan.runs else skipped(scale)
        state.trace.scales.append(replace(traced, ms=state.clock.stop()))
        state.trace.peak_cache_bytes = max(state.trace.peak_cache_bytes, state.cache_bytes())
        if scale.index == len(request.schedule) - 1:
            state.trace.scales = [
                replace(traced, ms=ms) for traced, ms in zip(state.trace.scales, state.clock.read(), strict=True)
            ]
            state.trace.unfired = unfired(state.trace, bound.directives)

    def _scale(
        self, state: RequestState, chosen: Chosen, scale: Scale, request: Request, wanted: frozenset[Signal]
    ) -> ScaleTrace:
        """Runs one scale: blocks, guidance, sampling, commit. The host never waits for the device here."""
        plan = chosen.plan
        layout = TokenLayout.of(chosen, state.live, scale.num_tokens)
        recorder = Recorder(
            wanted=wanted, store=state.deltas, layout=layout, grid=scale.grid, dtype=self.model.compute_dtype
        )
        tally = Tally.start(layout, request.wants_maps, state.f_hat_BZHW.device)
        weight = request.guidance.weights[scale.index] if request.guidance.on_logits else 1.0
        has_uncond = weight != 1.0 or Signal.LOGITS in wanted
        logits = self._logits(state, plan, scale, request, recorder, has_uncond)
        tally.count()
        guided = combine_logits(logits, weight, request.temperatures[scale.index])
        symbols = request.sampler.choose(
            scale.index,
            scale.grid,
            [self.tokenizer.symbols(logits_kV) for logits_kV in guided],
            layout.kept,
            request.filters[scale.index],
        )
        residual_BZhw = self._commit(state, plan, scale, layout, symbols)
        state.f_hat_BZHW = self.tokenizer.add(state.f_hat_BZHW, residual_BZhw, scale.index, len(request.schedule))
        state.residual_BZhw = residual_BZhw
        state.signals = Signals(
            scale=scale.index,
            grid=scale.grid,
            residual_BZhw=residual_BZhw if Signal.RESIDUAL in wanted else None,
            logits=branch_logits(logits, request.num_images) if Signal.LOGITS in wanted else None,
            block_change_Bl=recorder.finish(),
        )
        return tally.trace(scale, {row: part.shape[0] for row, part in logits.items()})

    def _logits(
        self, state: RequestState, plan: ScalePlan, scale: Scale, request: Request, recorder: Recorder, has_uncond: bool
    ) -> dict[Row, Float[Tensor, "_k V"]]:
        """Head outputs of the conditional rows, and of the unconditional ones where something reads them.

        What happens between the embedding and these is launched, or replayed where it has been captured.
        """
        layout = recorder.layout
        headed = [row for row in state.live if row[1] or has_uncond]
        rows = Rows(layout.rows.counts[: len(headed)])

        def run(x_nC: Tensor, rotation_nD: Tensor, prepared: Prepared, cache: KVCache) -> Tensor:
            reading = replace(state, prepared=prepared, cache=cache)
            x_nC = self._blocks(reading, plan, scale, request, recorder, x_nC, rotation_nD)
            return self.model.logits(x_nC[: rows.total], rows, prepared)

        x_nC = self._enter(state, scale, layout)
        rotation_nD = layout.pack([self.model.positions(request.schedule, scale.index)] * request.num_images)
        prefix = state.prefix_for(scale, layout, recorder)
        if prefix is None:
            packed_kV = run(x_nC, rotation_nD, state.prepared, state.cache)
        else:
            packed_kV = prefix.logits(scale, len(headed), x_nC, rotation_nD, run)
        return split_rows(packed_kV, headed, rows)

    def _blocks(
        self,
        state: RequestState,
        plan: ScalePlan,
        scale: Scale,
        request: Request,
        recorder: Recorder,
        x_nC: Float[Tensor, "n C"],
        rotation_nD: Float[Tensor, "n D"],
    ) -> Float[Tensor, "n C"]:
        """Runs all blocks over the packed tokens, which they change."""
        layout = recorder.layout
        for index in range(self.model.shape.num_blocks):
            active = layout.active(index)
            part_nC = x_nC if active.index_n is None else x_nC[active.index_n]
            before_nC = part_nC.clone() if recorder.is_on else None
            if active.rows.total:
                context = BlockContext(
                    rows=active.rows,
                    prepared=state.prepared,
                    rotation_nD=rotation_nD if active.index_n is None else rotation_nD[active.index_n],
                    slot=state.cache.slot(index, active.rows, scale.index < state.num_stored),
                )
                block = self._block(index, len(request.schedule) - scale.index)
                for sublayer in range(block.num_sublayers):
                    change = block.change(sublayer, part_nC, context)
                    add_gated_(part_nC, change.value_nC, change.gate_RC, active.rows)
            fill_nC = None
            if active.index_n is not None:
                fill_nC = recorder.fill_(index, x_nC) if plan.fill is Fill.CACHED else None
                x_nC[active.index_n] = part_nC
            if before_nC is not None:
                recorder.record(index, part_nC - before_nC, active.index_n, fill_nC)
            if index in request.guidance.hidden_blocks:
                x_nC = combine_hidden(x_nC, state.live, layout.rows, request.guidance.weights[scale.index])
        return x_nC

    def _block(self, index: int, scales_left: int) -> Block:
        """The block of this index at a scale; `scales_left` counts it and those behind it."""
        if self.late is not None and scales_left <= self.late.num_scales:
            return self.late.blocks[index]
        return self.model.block(index)

    def _enter(self, state: RequestState, scale: Scale, layout: TokenLayout) -> Float[Tensor, "n C"]:
        """Hidden states that enter the first block; both branches of an image share the embedding."""
        if scale.index == 0:
            if scale.num_tokens != 1:
                raise UnsupportedError(f"scale 0 must be one token, got the grid {scale.grid}")
            return self.model.start(state.prepared).clone()
        input_BZhw = self.tokenizer.next_input(state.f_hat_BZHW, scale.grid)
        return layout.pack(list(self.model.embed(input_BZhw, scale.index)))

    def _commit(
        self, state: RequestState, plan: ScalePlan, scale: Scale, layout: TokenLayout, symbols: list[Tensor]
    ) -> Float[Tensor, "B Z h w"]:
        """Residual = weight * lookup where a token ran, the base elsewhere."""
        if layout.kept is None or layout.keep_Bl is None:
            residual_BZhw = self.tokenizer.residual(torch.stack(symbols), scale.grid)
        else:
            full = symbols[0].new_zeros(len(symbols), layout.num_tokens, symbols[0].shape[-1])
            for image, index_k in enumerate(layout.kept):
                full[image, index_k] = symbols[image]
            residual_BZhw = self.tokenizer.residual(full, scale.grid)
        grid = (residual_BZhw.shape[-2], residual_BZhw.shape[-1])
        if plan.weight_Bl is not None:
            residual_BZhw = residual_BZhw * _on_latents(plan.weight_Bl, scale.grid, grid)
        if layout.keep_Bl is None:
            return residual_BZhw
        base_BZhw = torch.zeros_like(residual_BZhw)
        if plan.base is Base.PREVIOUS and state.residual_BZhw is not None:
            base_BZhw = F.interpolate(state.residual_BZhw, size=grid, mode="nearest")
        return torch.where(_on_latents(layout.keep_Bl, scale.grid, grid), residual_BZhw, base_BZhw)


def _on_latents(map_Bl: Tensor, grid: tuple[int, int], latent_grid: tuple[int, int]) -> Tensor:
    """A per-token map as (B, 1, h, w) on the latent grid behind the tokens."""
    map_B1hw = map_Bl.unflatten(-1, grid)[:, None]
    patch = latent_grid[0] // grid[0]
    return map_B1hw.repeat_interleave(patch, -2).repeat_interleave(patch, -1) if patch > 1 else map_B1hw


def _refuse_equal_branches(bound: Bound, request: Request) -> None:
    """A policy that compares the branches' logits has nothing to compare where hidden states were combined before."""
    reads_logits = any(Signal.LOGITS in bound.record(s) for s in range(len(request.schedule)))
    if reads_logits and request.guidance.hidden_blocks:
        raise PlanConflictError(
            "guidance inside the blocks makes both branches' logits equal, so they cannot decide when to stop; "
            "combine guidance on logits only, or switch that rule off"
        )
