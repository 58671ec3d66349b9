"""The scale loop: plan, embed, blocks, sample, commit; independent of concrete policies, models and tokenizers.

Axes: B images, n packed tokens, k tokens that reach the head, C width, V outputs, Z latent channels.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.cost import Row
from foveate.core.errors import PlanConflictError
from foveate.core.isolation import inference
from foveate.core.plan import BlockDtype, KeepDifference
from foveate.core.policy import Bound, refuse_spread
from foveate.core.protocols import Block, NextScaleModel, Prepared, Refiner, ScaleTokenizer
from foveate.core.signals import BranchLogits, Decoded, Record, Signal, Signals
from foveate.core.trace import ScaleTrace, Trace, unfired
from foveate.engine.branches import combine_logits, difference_of, guide_by_difference, per_image
from foveate.engine.commit import residual_of
from foveate.engine.company import Company
from foveate.engine.counting import trace_of
from foveate.engine.fills import Difference
from foveate.engine.finite import broken_numbers, finite_of
from foveate.engine.graphs import Graphs
from foveate.engine.kv_cache import KVCache
from foveate.engine.refinement import refine, refine_inputs, refined_tokens
from foveate.engine.scale_run import ScaleRun, refuse_thinned
from foveate.engine.spread import soft_bits, thresholds_of
from foveate.engine.state import Request, RequestState
from foveate.kernels.gpu import launch
from foveate.kernels.heap import kept_heap


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleStep:
    """What the engine hands out after every scale; `f_hat_BZHW` is the latent so far and is never changed later."""

    scale: int
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Heads:
    """Of the tokens of one run that reach the head: hidden states, what the head's linear layer reads, and logits."""

    hidden_kC: Float[Tensor, "k C"] | None
    inputs_kC: Float[Tensor, "k C"] | None
    logits_kV: Float[Tensor, "k V"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Outcome:
    """All that a scale changes of its request, computed before anything is changed."""

    run: ScaleRun
    trace: ScaleTrace
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    residual_BZhw: Tensor | None
    signals: Signals | None
    difference: Difference | None
    finite: Tensor | None = None
    lost: Tensor | None = None


class Engine:
    """Runs a model and a tokenizer under bound policies; holds no state of any request."""

    def __init__(
        self,
        model: NextScaleModel,
        tokenizer: ScaleTokenizer,
        graphs: Graphs | None = None,
        refiner: Refiner | None = None,
        *,
        obeys_autocast: bool = False,
        uses_triton: bool = False,
    ) -> None:
        """Stores the model and the tokenizer.

        Args:
            model: On its device; with graphs it stays there.
            tokenizer: Of the same family.
            graphs: Replays the first scales of requests that run alone; None launches every kernel.
            refiner: The family's step between sampling and commit; None where it has none.
            obeys_autocast: Whether autocast of the caller reaches the model, as for a model of the caller's own.
            uses_triton: Whether Triton kernels run on a GPU (`kernels.gpu.launch`).
        """
        self.obeys_autocast, self.uses_triton = obeys_autocast, uses_triton
        self.model, self.tokenizer, self.graphs, self.refiner = model, tokenizer, graphs, refiner
        self._narrowed: dict[tuple[int, torch.dtype], Block] = {}

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What the engine computes in: without gradients and, unless it obeys it, without the caller's autocast."""
        with (
            torch.inference_mode() if self.obeys_autocast else inference(self.model.device),
            launch.enabled(self.uses_triton),
        ):
            yield

    def open(self, bound: Bound, request: Request) -> RequestState:
        """A request before its first scale; `RequestState.release` ends it.

        Raises:
            PlanConflictError: The policy asks for what the request cannot give.
        """
        _refuse_equal_branches(bound, request)
        refuse_spread(bound, len(request.schedule), self.model.shape)
        with self.guard():
            return RequestState.open(self.model, self.tokenizer, bound, request, self.graphs)

    def run(self, bound: Bound, request: Request) -> Generator[ScaleStep, None, None]:
        """Generates, handing out the latent after every scale.

        Closing the iterator cancels the request; nothing of it remains.

        Raises:
            PlanConflictError: A plan asks for what cannot be done.
        """
        with kept_heap():
            state = self.open(bound, request)
            try:
                while not state.is_done:
                    (outcome,) = self.step([state])
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield outcome
            finally:
                state.release()

    def step(self, states: Sequence[RequestState]) -> list[ScaleStep | Exception]:
        """Runs the next scale of each request, all in one batch: different scales, sizes and policies go together.

        A scale is a transaction: where it fails, the request is as it was before. If the batch fails, each member is
        tried alone, and only one that fails again is answered with its error.

        Args:
            states: Requests of this engine that are not done, each once.

        Returns:
            Per request, what its scale left or the error that it raised.
        """
        before = [state.request.sampler.state() for state in states]
        outcomes: list[ScaleStep | Exception] | None = None
        try:
            with self.guard():
                outcomes = self._advance(states)
        except Exception as error:  # whatever a policy, a model or the device raises is the answer of its request
            for state, sampler_state in zip(states, before, strict=True):
                state.request.sampler.restore(sampler_state)
            if len(states) == 1:
                return [error]
        if outcomes is None:
            # Behind the handler: its error would hold the tensors of the batch, and memory may be what was missing.
            return [outcome for state in states for outcome in self.step([state])]
        for state, sampler_state, outcome in zip(states, before, outcomes, strict=True):
            if isinstance(outcome, Exception):
                state.request.sampler.restore(sampler_state)
        return outcomes

    def _advance(self, states: Sequence[RequestState]) -> list[ScaleStep | Exception]:
        """Decide, embed, blocks, sample; then commit. The host reads the device at most once per request, to decide."""
        for state in states:
            state.clock.start()
        runs = [ScaleRun.begin(state, self.model) for state in states]
        heads: dict[int, _Heads] = {}
        for company in _companies(runs):
            heads |= zip(map(id, company.runs), self._heads(company), strict=True)
        outcomes = [self._sampled(run, heads[id(run)]) if run.plan.runs else _skipped(run) for run in runs]
        errors = [broken_numbers(outcome.run.state, outcome.finite) for outcome in outcomes]
        return [
            _tried(outcome, len(states)) if error is None else error
            for outcome, error in zip(outcomes, errors, strict=True)
        ]

    def _heads(self, company: Company) -> Sequence[_Heads]:
        """Embeds and runs the blocks and the head, launched or, for a request by itself, replayed from a graph."""
        x_nC, rotation_nD = company.enter(self.model, self.tokenizer)
        run, graph = company.runs[0], company.runs[0].state.graph if len(company.runs) == 1 else None
        is_whole = run.is_dense and run.prepared is run.state.prepared and not self._refines(run)
        if graph is not None and graph.serves(run.scale) and is_whole:

            def work(x_nC: Tensor, rotation_nD: Tensor, prepared: Prepared, cache: KVCache) -> Tensor:
                alone = Company([replace(run, prepared=prepared, cache=cache)])
                return self._forward(alone, x_nC, rotation_nD)[0].logits_kV

            num_headed = sum(n > 0 for n in run.headed)
            logits_kV = graph.logits(run.scale, num_headed, x_nC, rotation_nD, work)
            return [_Heads(hidden_kC=None, inputs_kC=None, logits_kV=logits_kV)]
        for each in company.runs:
            each.state.leave_graph()
        return self._forward(company, x_nC, rotation_nD)

    def _forward(
        self, company: Company, x_nC: Float[Tensor, "n C"], rotation_nD: Float[Tensor, "n D"]
    ) -> Sequence[_Heads]:
        """Blocks and head of a batch; `x_nC` is changed."""
        dtype_of = company.runs[0].plan.dtype_of
        blocks = [partial(self._block, index, dtype_of(index)) for index in range(self.model.shape.num_blocks)]
        company.blocks(x_nC, rotation_nD, blocks)
        hidden_kC, rows = company.headed(x_nC)
        inputs_kC = self.model.head_input(hidden_kC, rows, company.prepared)
        counts = [sum(run.headed) for run in company.runs]
        inputs = company.split(inputs_kC, counts)
        if self._keeps_inputs:
            for run, part_kC in zip(company.runs, inputs, strict=True):
                images = per_image(run, part_kC)
                for image, guided in zip(images, guide_by_difference(run, images, self.tokenizer), strict=True):
                    if guided is not image:
                        image.cond_kV.copy_(guided.cond_kV)
        logits_kV = self.model.head_logits(inputs_kC)
        parts = zip(company.split(hidden_kC, counts), inputs, company.split(logits_kV, counts), strict=True)
        return [_Heads(hidden_kC=hidden, inputs_kC=part, logits_kV=logits) for hidden, part, logits in parts]

    @property
    def _keeps_inputs(self) -> bool:
        """Whether a cached difference is one of head inputs: the linear layer keeps it, and they may be narrower."""
        return self.model.shape.width <= self.model.shape.head_outputs

    def _block(self, index: int, dtype: torch.dtype | None) -> Block:
        """The block of this index, or its copy in a narrower dtype, which is made once."""
        if dtype is None or dtype == self.model.compute_dtype:
            return self.model.block(index)
        if (index, dtype) not in self._narrowed:
            self._narrowed[(index, dtype)] = self.model.narrowed(index, dtype)
        return self._narrowed[(index, dtype)]

    def _refines(self, run: ScaleRun) -> bool:
        return self.refiner is not None and run.scale.index == len(run.state.request.schedule) - 1

    def _sampled(self, run: ScaleRun, heads: _Heads) -> _Outcome:
        """Guidance, sampling, the residual and what the policy asked to know; the host never waits here."""
        state, request, scale = run.state, run.state.request, run.scale
        logits = per_image(run, heads.logits_kV)
        difference = state.difference
        if KeepDifference() in run.keeps:
            kept_kW = heads.inputs_kC if self._keeps_inputs else heads.logits_kV
            assert kept_kW is not None, "no graph ran where something is kept"
            difference = difference_of(run, per_image(run, kept_kW))
        guided = combine_logits(
            logits if self._keeps_inputs else guide_by_difference(run, logits, self.tokenizer),
            run.weight,
            request.temperatures[scale.index],
        )
        residual_BZhw, lost, refined = self._residual(run, heads, guided)
        f_hat_BZHW = self.tokenizer.add(state.f_hat_BZHW, residual_BZhw, scale.index, len(request.schedule))
        return _Outcome(
            run=run,
            trace=trace_of(run, refined),
            lost=lost,
            f_hat_BZHW=f_hat_BZHW,
            residual_BZhw=residual_BZhw,
            signals=self._signals(run, logits, residual_BZhw, f_hat_BZHW),
            difference=difference,
            finite=finite_of(logits, guided, f_hat_BZHW),
        )

    def _residual(
        self, run: ScaleRun, heads: _Heads, guided: Sequence[Float[Tensor, "_k V"]]
    ) -> tuple[Float[Tensor, "B Z y x"], Tensor | None, dict[Row, int]]:
        """Samples, and looks up what the scale adds to the latent.

        Returns:
            The residual, how many copies were lost (`residual_of`), and the tokens that were refined, by row.
        """
        request, scale = run.state.request, run.scale
        values = [self.tokenizer.symbols(logits_kV) for logits_kV in guided]
        thresholds = thresholds_of(run, values[0].shape[1])
        asked = (scale.index, scale.grid, values, run.kept_images(), request.filters[scale.index])
        drawn: Sequence[Tensor] | None = None
        if self._refines(run):
            symbols, drawn = request.sampler.choose_with_draws(*asked)
        else:
            symbols = request.sampler.choose(*asked)
        soft_Bld = None if thresholds is None else soft_bits(run, values, symbols, thresholds, self.tokenizer)
        residual_BZhw, lost = residual_of(run, symbols, self.tokenizer, soft_Bld)
        if drawn is None or self.refiner is None:
            return residual_BZhw, lost, {}
        assert heads.hidden_kC is not None, "no graph ran"
        inputs = refine_inputs(run, heads.hidden_kC, drawn)
        added_BZhw = refine(self.refiner, run.state.refining, inputs, residual_BZhw)
        return residual_BZhw + added_BZhw, lost, refined_tokens(inputs)

    def _signals(
        self, run: ScaleRun, logits: tuple[BranchLogits, ...], residual_BZhw: Tensor, f_hat_BZHW: Tensor
    ) -> Signals:
        """The signals of this scale that the policy asked for."""
        decoded: dict[Record, Tensor] = {}
        for record in run.records:
            if isinstance(record, Decoded):
                small_BZhw = F.interpolate(f_hat_BZHW, size=(record.side, record.side), mode="area")
                decoded[record] = self.tokenizer.decode(small_BZhw)
        return Signals(
            scale=run.scale.index,
            grid=run.scale.grid,
            residual_BZhw=residual_BZhw if Signal.RESIDUAL in run.records else None,
            f_hat_BZHW=f_hat_BZHW if Signal.F_HAT in run.records else None,
            logits=logits if Signal.LOGITS in run.records else None,
            values=run.values | run.idle_values(self.model.shape.width) | decoded,
        )


def _companies(runs: Sequence[ScaleRun]) -> list[Company]:
    """Batches of runs that narrow the same blocks to the same dtypes."""
    groups: dict[tuple[BlockDtype, ...], list[ScaleRun]] = {}
    for run in runs:
        if run.plan.runs:
            groups.setdefault(run.plan.dtypes, []).append(run)
    return [Company(group) for group in groups.values()]


def _skipped(run: ScaleRun) -> _Outcome:
    """A scale that does not run leaves everything as it was."""
    state = run.state
    return _Outcome(
        run=run,
        trace=trace_of(run, {}),
        f_hat_BZHW=state.f_hat_BZHW,
        residual_BZhw=state.residual_BZhw,
        signals=state.signals,
        difference=state.difference,
    )


def _tried(outcome: _Outcome, share: int) -> ScaleStep | Exception:
    """As `_committed`; an error is the answer of its own request, as the others have gone on."""
    try:
        return _committed(outcome, share)
    except Exception as error:  # such as too little memory
        return error


def _committed(outcome: _Outcome, share: int) -> ScaleStep:
    """Takes a request over to what its scale left; `share` is how many requests shared the time of it."""
    state, trace = outcome.run.state, outcome.run.state.trace
    outcome.run.commit()
    state.f_hat_BZHW, state.residual_BZhw = outcome.f_hat_BZHW, outcome.residual_BZhw
    state.signals, state.difference = outcome.signals, outcome.difference
    trace.stopped = state.dropped
    state.shares.append(share)
    state.lost.append(outcome.lost)
    if outcome.finite is not None and outcome.finite.device.type != "cpu":
        state.finite.append(outcome.finite)
    trace.scales.append(replace(outcome.trace, ms=state.clock.stop() / share))
    trace.peak_cache_bytes = max(trace.peak_cache_bytes, state.cache_bytes())
    if state.is_done:
        opened_ms, *step_ms = state.clock.read()
        shared = [ms / share for ms, share in zip(step_ms, state.shares, strict=True)]
        shared[0] += opened_ms
        numbers = [number for number in state.lost if number is not None]
        read = iter(torch.stack(numbers).cpu().tolist() if numbers else [])
        lost = [0 if number is None else next(read) for number in state.lost]
        trace.scales = [
            replace(part, ms=ms, lost_copies=n) for part, ms, n in zip(trace.scales, shared, lost, strict=True)
        ]
        # Only the last try counts where a scale ran again; mates at other scales share this time as that of the scale.
        refiner_ms = min(sum(state.refining.read()[-1:], 0.0), shared[-1])
        trace.scales[-1] = replace(trace.scales[-1], refiner_ms=refiner_ms)
        trace.unfired = unfired(trace, state.bound.directives)
    return ScaleStep(scale=outcome.trace.scale, f_hat_BZHW=state.f_hat_BZHW, trace=trace)


def _refuse_equal_branches(bound: Bound, request: Request) -> None:
    """Refuses a policy that compares the branches, or thins one, where guidance combines them inside the blocks."""
    if not request.guidance.hidden_blocks:
        return
    scales = range(len(request.schedule))
    if any(Signal.LOGITS in bound.record(s) or KeepDifference() in bound.keeps(s) for s in scales):
        raise PlanConflictError(
            f"{bound.label}: guidance inside the blocks makes both branches' logits equal, so they cannot decide when "
            "to stop, or anything else; combine guidance on logits only, or switch that rule off"
        )
    for plan in (plan for s in scales for plan in bound.ceilings(s)):
        refuse_thinned(bound.label, plan)
