"""Runs a measurement: every size and batch in turn, all policies alternating within each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from foveate.bench.machine import describe_machine
from foveate.bench.measure import Measure
from foveate.bench.memory import Memory, meter_for, weights_bytes
from foveate.bench.peak import MATMUL_SIZES, MatmulPeak, matmul_peak
from foveate.bench.report import BenchReport, Case
from foveate.bench.rounds import Stop, alternate
from foveate.bench.timing import Timing
from foveate.bench.workload import Picture, Workload, check_workload
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.families.loading import LoadedModel
from foveate.pipeline.output import describe_precision, processor_name
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.said_once import warnings_once

T = TypeVar("T")

KINDS = ("latency", "throughput", "memory", "calibrate")

_TIMING_METHOD = (
    "wall clock; the device is waited for after every scale and after decoding",
    "ms.total is the whole call: text encoder, transformer, refiner, decoder, copying the images to memory as bytes",
    "ms.refiner is a family's own step behind the sampler of the last scale, such as HART's residual diffusion",
    "the first scale holds what a call prepares once: text keys and values, modulation, allocation of the cache",
    "ratios are formed within a round, baseline over policy, then summarised",
    "efficiency is speedup.transformer over speedup.by_flops, both of the transformer without the refiner",
    "peak_share: counted FLOPs of the transformer over its time, over the best square matrix product of this process",
    "images_per_s: all images over all time of the rounds that count, one batch after the other",
)
_MEMORY_METHOD = (
    "weights are counted from parameters and buffers",
    "bytes.kv is counted: the most that the cache of keys and values held, its shared scratch included",
    "bytes.transformer is the peak before decoding begins, bytes.call that of the whole call, the decoder included",
    "bytes.peak is the weights and bytes.call",
    "bytes.caches is counted: text keys and values, modulation and the changes of blocks that a policy reads again",
    "bytes.activations is bytes.transformer less bytes.kv and bytes.caches",
)
_NO_METER = "this system cannot measure the memory of a process: only weights, bytes.kv and bytes.caches are reported"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPlan:
    """What is measured; the first policy is the baseline. Rounds that warm up come before the `runs` that count."""

    kind: str
    policies: tuple[Policy, ...]
    workloads: tuple[Workload, ...]
    runs: int
    warmup: int
    command: str

    def __post_init__(self) -> None:
        """Refuses what could not be measured."""
        if self.kind not in KINDS:
            raise FoveateError(f"a measurement is one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.policies or not self.workloads:
            raise FoveateError("a measurement needs at least one policy and one size, got none")
        if self.runs < 1 or self.warmup < 0:
            raise FoveateError(f"runs must be 1 or more and warmup 0 or more, got {self.runs} and {self.warmup}")


def run_bench(pipe: Pipeline, plan: BenchPlan, *, hides_progress: bool | None = None) -> BenchReport:
    """Measures.

    After Ctrl-C, or where a device has no memory left, the report holds the complete rounds and says so.

    Args:
        pipe: The model; its own progress bar should be off, as it would be timed.
        plan: What is measured.
        hides_progress: False shows progress on stderr, True hides it, None shows it only where that is a terminal.

    Raises:
        FoveateError: What the pipeline or a policy refuses, before anything is measured; or not one round fitted.
        KeyboardInterrupt: Not one round was complete.
    """
    num_rounds = plan.warmup + plan.runs
    model, weights = pipe.model, weights_bytes(pipe.model)
    peak: MatmulPeak | None = None
    method: tuple[str, ...]
    with warnings_once():
        pictures = [check_workload(pipe, workload, plan.policies, num_rounds) for workload in plan.workloads]
        if plan.kind == "memory":
            meter = meter_for(model.device)
            method = (*_MEMORY_METHOD, _NO_METER if meter is None else meter.method)
            memory = Memory(meter=meter, weights=sum(weights.values()))
            cases, stopped = _run_cases(pipe, plan, pictures, memory, hides_progress)
        else:
            method = _TIMING_METHOD
            peak = matmul_peak(model.dtype, model.device, MATMUL_SIZES)
            timing = Timing(peak_flops_per_s=peak.flops_per_s)
            cases, stopped = _run_cases(pipe, plan, pictures, timing, hides_progress)
    return BenchReport(
        kind=plan.kind,
        command=plan.command,
        machine={**describe_machine(), "used": processor_name(model.device)},
        model=_describe_model(model),
        settings=_describe_settings(plan),
        peak=peak,
        weights_bytes=weights,
        cases=cases,
        method=method,
        excluded=_excluded(plan),
        stopped=stopped,
    )


def _run_cases(
    pipe: Pipeline, plan: BenchPlan, pictures: Sequence[Picture], measure: Measure[T], hides_progress: bool | None
) -> tuple[tuple[Case, ...], Stop | None]:
    """Every workload until one is stopped; at least one case."""
    cases: list[Case] = []
    stopped: Stop | None = None
    rounds_of_all = len(plan.workloads) * (plan.warmup + plan.runs)
    with tqdm(total=rounds_of_all, disable=hides_progress, unit="round", leave=False) as bar:
        for workload, picture in zip(plan.workloads, pictures, strict=True):
            bar.set_description(f"{picture.width}x{picture.height}, batch {workload.batch}")

            def once(side: int, index: int, workload: Workload = workload) -> T:
                return measure.once(pipe, workload, plan.policies[side], index)

            rounds = alternate(
                once,
                len(plan.policies),
                runs=plan.runs,
                warmup=plan.warmup,
                after_round=bar.update,
            )
            if rounds.rounds:
                entries = measure.entries(plan.policies, rounds)
                cases.append(Case(picture=picture, batch=workload.batch, rounds=len(rounds.rounds), entries=entries))
            stopped = rounds.stopped
            if stopped is not None:
                break
    if not cases:
        _raise(stopped)
    return tuple(cases), stopped


def _raise(stopped: Stop | None) -> None:
    """Raises the error of a measurement without a single complete round."""
    if stopped is Stop.INTERRUPTED:
        raise KeyboardInterrupt
    raise FoveateError("not enough memory for a single round; take a smaller --size or --batch, or a smaller model")


def _describe_model(model: LoadedModel) -> dict[str, Any]:
    return {
        "name": model.spec.name,
        "weights": model.weights,
        "sha256": model.sha256,
        **describe_precision(model.precision),
        "device": str(model.device),
    }


def _describe_settings(plan: BenchPlan) -> dict[str, Any]:
    return {
        "policies": [policy.spec for policy in plan.policies],
        "runs": plan.runs,
        "warmup": plan.warmup,
        "seed": plan.workloads[0].seed,
        "num_prompts": len(plan.workloads[0].prompts),
        "first_prompt": plan.workloads[0].prompts[0],
        "threads": torch.get_num_threads(),
    }


def _excluded(plan: BenchPlan) -> tuple[str, ...]:
    rounds = "round" if plan.warmup == 1 else "rounds"
    warm = f"{plan.warmup} warm-up {rounds} at every size and batch"
    return (
        warm if plan.warmup else "no warm-up round: the first round counts, and first calls are slow",
        "loading the model",
        "encoding image files",
    )
