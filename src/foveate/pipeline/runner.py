"""Runs calls scale by scale: what the pipeline's own loop and a scheduler of many calls share.

A call is opened, advanced once per scale, alone or in one batch with others, and finished. Nothing of it stays behind.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.conditions import Condition
from foveate.core.errors import BrokenNumbersError
from foveate.core.isolation import inference
from foveate.core.policy import Bound
from foveate.core.trace import Trace
from foveate.core.warnings import CallWarning, log_warnings
from foveate.engine.executor import Engine, ScaleStep
from foveate.engine.finite import check_pixels
from foveate.engine.report import Milliseconds, build_report, without_effect
from foveate.engine.sample import KeyedSampler, ReferenceSampler, Sampler, SmoothSampler
from foveate.engine.state import Request, RequestState
from foveate.families.loading import LoadedModel
from foveate.families.offload import CODEBOOK, DECODER, TEXT_ENCODER, TRANSFORMER, Offload
from foveate.pipeline.budget import with_policy
from foveate.pipeline.call import Job
from foveate.pipeline.deadline import Deadline, Ladder, late
from foveate.pipeline.output import Images, PipelineOutput, describe, merge_traces, quoted, to_images


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """The prompts of a call, encoded: conditions per prompt, what was cut off, and how long it took."""

    conditions: tuple[Condition, ...]
    negatives: tuple[Condition, ...]
    warnings: tuple[CallWarning, ...]
    ms: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BatchStep:
    """All images of a call after one scale."""

    scale: int
    f_hat_BZHW: Float[Tensor, "B Z H W"]
    trace: Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenCall:
    """A call between its scales; `Runner.close` frees it.

    `states` are those of its requests, none once it is closed. `began` is when the call began, as `time.perf_counter`
    has it, and `deadline` the clock of a call that has one.
    """

    job: Job
    bound: Bound
    requests: tuple[Request, ...]
    states: list[RequestState]
    encoded: Encoded
    began: float
    deadline: Deadline | None

    @property
    def next_scale(self) -> int:
        """The scale that `Runner.advance` runs next; the number of scales when all have run."""
        return self.states[0].scale


@dataclass(kw_only=True, slots=True, eq=False)
class Runner:
    """A loaded model, its engine, and what moves its modules; holds no state of any call."""

    model: LoadedModel
    engine: Engine
    offload: Offload | None = None
    uses_triton: bool = False

    def encode(self, job: Job) -> Encoded:
        """The conditions of a call's prompts, and negative ones if there are any; the conditioner is asked once."""
        began = time.perf_counter()
        null, count = self.model.spec.kind.null_prompt, len(job.prompts)
        texts = (null,) * count if job.negatives is None and null is not None else job.negatives
        negatives = texts if texts is not None and job.guidance.is_needed(0) else ()
        with self.working(TEXT_ENCODER):
            with inference(self.model.device):
                found = self.model.text.encode([*job.prompts, *negatives])
            warnings = self._cut_prompts(job)
            log_warnings(warnings)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return Encoded(
            conditions=tuple(found[:count]),
            negatives=tuple(found[count:]),
            warnings=warnings,
            ms=1e3 * (time.perf_counter() - began),
        )

    def open(self, job: Job, began: float, *, encoded: Encoded | None = None, times_scales: bool = False) -> OpenCall:
        """A call before its first scale.

        Args:
            job: The call.
            began: When it began, as `time.perf_counter` has it: its deadline counts from there.
            encoded: Its prompts, where they have been encoded already.
            times_scales: Whether the time of a scale must be known when it has run.

        Raises:
            FoveateError: The policy asks for what the call cannot give, or a deadline has no profile.
        """
        bound = job.policy.bind(job.schedule, self.model.transformer.shape)
        budget_ms, deadline = job.options["latency_budget_ms"], None
        ladder = None if budget_ms is None else Ladder.of(job, self.model)
        encoded = encoded or self.encode(job)
        requests = self.requests(job, encoded, times_scales=times_scales)
        if ladder is not None and budget_ms is not None:
            deadline = Deadline.of(ladder, float(budget_ms), began)
            bound = deadline.policy.bind(job.schedule, self.model.transformer.shape)
            requests = tuple(replace(r, remaining_ms=deadline.remaining_ms, times_scales=True) for r in requests)
        states: list[RequestState] = []
        try:
            with self.working(TRANSFORMER, CODEBOOK):
                for request in requests:
                    states.append(self.engine.open(bound, request))
        except BaseException:
            for state in states:
                state.release()
            raise
        return OpenCall(
            job=job,
            bound=bound,
            requests=requests,
            states=states,
            encoded=encoded,
            began=began,
            deadline=deadline,
        )

    def advance(self, calls: Sequence[OpenCall], *, decodes: bool = False) -> list[BatchStep | Exception]:
        """Runs the next scale of each call, all in one batch where rows are independent, else image by image.

        Args:
            calls: Open calls of this runner, each once, that have scales left.
            decodes: Whether the decoder is wanted afterwards, too: it then stays beside the transformer.

        Returns:
            Per call, what its scale left, or the error that it raised; the other calls go on.
        """
        states = [state for call in calls for state in call.states]
        with self.working(TRANSFORMER, CODEBOOK, *((DECODER,) if decodes else ())):
            companies = [states] if self.model.has_independent_rows else [[state] for state in states]
            outcomes = [outcome for part in companies for outcome in self.engine.step(part)]
        found, first = [], 0
        for call in calls:
            found.append(_together(outcomes[first : first + len(call.states)]))
            first += len(call.states)
        return found

    def close(self, call: OpenCall) -> None:
        """Frees what a call holds; more than once does no harm, and `finish` still works."""
        while call.states:
            call.states.pop().release()

    def decode(self, f_hat_BZHW: Float[Tensor, "B Z H W"], output_type: str, beside: tuple[str, ...] = ()) -> Images:
        """Images of a latent; the modules in `beside` stay on the device.

        Raises:
            BrokenNumbersError: Pixels are NaN or infinite.
        """
        if output_type == "latent":
            # A copy made here is an ordinary tensor, which autograd and in-place operations take.
            return f_hat_BZHW.clone()
        with self.working(*beside, DECODER), inference(self.model.device):
            pixels_B3YX = self.model.tokenizer.decode(f_hat_BZHW)
        check_pixels(pixels_B3YX)
        return to_images(pixels_B3YX, output_type)

    def finish(self, call: OpenCall, step: BatchStep, warnings: Sequence[CallWarning] = ()) -> PipelineOutput:
        """Decodes, and says what it took.

        Args:
            call: Which ran up to this step.
            step: Its last one, or an earlier one whose image is wanted.
            warnings: What the caller has to say of the call.
        """
        job, decoding = call.job, time.perf_counter()
        images = self.decode(step.f_hat_BZHW, job.options["output_type"])
        if isinstance(images, Tensor) and images.is_cuda:
            torch.cuda.synchronize(images.device)
        trace = step.trace
        trace.text_ms, trace.decoder_ms = call.encoded.ms, 1e3 * (time.perf_counter() - decoding)
        ms = Milliseconds(
            text=trace.text_ms,
            transformer=trace.transformer_ms,
            refiner=trace.refiner_ms,
            decoder=trace.decoder_ms,
            total=1e3 * (time.perf_counter() - call.began),
        )
        if call.deadline is not None:
            job = with_policy(job, call.deadline.taken())
        behind = (*without_effect(job.policy.spec, trace.unfired), *late(job, ms.total))
        log_warnings(behind)
        return PipelineOutput(
            images=images,
            prompts=job.per_image(job.prompts),
            seeds=job.seeds,
            config=describe(job, self.model, uses_triton=self.uses_triton),
            report=build_report(
                trace,
                call.bound,
                call.requests,
                ms,
                (*warnings, *call.encoded.warnings, *behind),
                notes=job.notes,
                latency_budget_ms=job.asked.get("latency_budget_ms"),
            ),
            trace=trace,
        )

    @contextmanager
    def parts(self) -> Iterator[None]:
        """Moves all modules back to the CPU after a call, however it ends."""
        try:
            yield
        finally:
            with self.working():
                pass

    def working(self, *parts: str) -> AbstractContextManager[None]:
        """Has exactly these modules on the device, if offload is on."""
        return nullcontext() if self.offload is None else self.offload.working(*parts)

    def requests(self, job: Job, encoded: Encoded, *, times_scales: bool = False) -> tuple[Request, ...]:
        """One request per image, or one for the batch where the device or the order of draws wants that."""
        conditions, negatives = job.per_image(encoded.conditions), job.per_image(encoded.negatives)

        def request(images: Sequence[int]) -> Request:
            return Request(
                schedule=job.schedule,
                guidance=job.guidance,
                temperatures=job.temperatures,
                filters=job.filters,
                sampler=self._sampler(job, images),
                conditions=tuple(conditions[i] for i in images) + tuple(negatives[i] for i in images if negatives),
                num_images=len(images),
                wants_maps=job.options["trace"],
                times_scales=times_scales,
            )

        everything = range(job.num_images)
        if job.is_batch_invariant(self.model.has_independent_rows):
            return tuple(request([i]) for i in everything)
        return (request(everything),)

    def _cut_prompts(self, job: Job) -> tuple[CallWarning, ...]:
        """Says which prompts lost their end."""
        lengths = {prompt: self.model.text.num_cut(prompt) for prompt in dict.fromkeys(job.prompts)}
        return tuple(
            CallWarning(code="prompt_cut", message=f"the prompt {quoted(p)} is too long: its last {n} tokens were cut")
            for p, n in lengths.items()
            if n
        )

    def _sampler(self, job: Job, images: Sequence[int]) -> Sampler:
        if job.options["rng"] == "keyed":
            sampler: KeyedSampler | ReferenceSampler = KeyedSampler(seeds=tuple(job.seeds[i] for i in images))
        elif (generator := job.options["generator"]) is not None:
            sampler = ReferenceSampler(generator=generator)
        else:
            sampler = ReferenceSampler(generator=torch.Generator(self.model.device).manual_seed(job.seeds[0]))
        if job.smooth_scales is None:
            return sampler
        first, end = job.smooth_scales
        return SmoothSampler(
            inner=sampler,
            num_scales=len(job.schedule),
            first=first,
            end=end,
            is_after_draw=self.model.spec.kind.smooths_after_draw,
            holds_last=self.model.spec.kind.holds_last,
        )


def _together(outcomes: Sequence[ScaleStep | Exception]) -> BatchStep | Exception:
    """One call's images after a scale, or the error that ends it; broken numbers name every image that broke."""
    errors = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, Exception)}
    for error in errors.values():
        if not isinstance(error, BrokenNumbersError) or len(outcomes) == 1:
            return error
        return BrokenNumbersError(error.reason, [i for i, e in errors.items() if isinstance(e, BrokenNumbersError)])
    steps = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
    latents = [step.f_hat_BZHW for step in steps]
    return BatchStep(
        scale=steps[0].scale,
        f_hat_BZHW=latents[0] if len(latents) == 1 else torch.cat(latents),
        trace=merge_traces([step.trace for step in steps]),
    )
