"""Time of a call: text encoder, transformer, refiner and decoder apart and end to end, and of every scale.

Ratios are formed within a round, baseline over policy, and only then summarised: what slows both does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.bench.measure import Measure
from foveate.bench.report import Entry, ScaleFigures
from foveate.bench.spread import Spread, supported_percentiles
from foveate.bench.workload import Workload
from foveate.core.cost import scale_flops
from foveate.core.policy import Policy
from foveate.core.schedule import Grid
from foveate.engine.report import Milliseconds
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRun:
    """One scale of one call, all rows of the batch together."""

    scale: int
    grid: Grid
    ms: float
    flops: int
    token_blocks: int
    blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedRun:
    """One call; the first scale's time and FLOPs hold what the request prepares once, the last one's the refiner's.

    `refiner_flops` are a part of `flops_run`.
    """

    num_images: int
    ms: Milliseconds
    flops_run: int
    flops_full: int
    kv_bytes: int
    scales: tuple[ScaleRun, ...]
    refiner_flops: int = 0

    @classmethod
    def of(cls, output: PipelineOutput) -> "TimedRun":
        """What a call reported."""
        report, trace = output.report, output.trace
        works = [scale.work for scale in trace.scales]
        scales = tuple(
            ScaleRun(
                scale=scale.scale,
                grid=scale.grid,
                ms=scale.ms,
                flops=flops,
                token_blocks=scale.work.token_blocks,
                blocks=scale.work.blocks_run,
            )
            for scale, flops in zip(trace.scales, scale_flops(works, trace.shape, trace.text_tokens), strict=True)
        )
        return cls(
            num_images=len(output.prompts),
            ms=report.ms,
            flops_run=report.flops_run,
            flops_full=report.flops_full,
            kv_bytes=report.kv_bytes_peak,
            scales=scales,
            refiner_flops=report.refiner_flops_run,
        )

    @property
    def rest_ms(self) -> float:
        """Rest of the call, outside all parts: checking options, and the report itself."""
        return self.ms.total - self.ms.text - self.ms.transformer - self.ms.refiner - self.ms.decoder

    @property
    def transformer_flops(self) -> int:
        """FLOPs of the transformer alone."""
        return self.flops_run - self.refiner_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing(Measure[TimedRun]):
    """Measures time; `peak_flops_per_s` is what the transformer is held against, None leaves that out."""

    peak_flops_per_s: float | None

    def once(self, pipe: Pipeline, workload: Workload, policy: Policy, round_index: int) -> TimedRun:
        """Generates one batch; the images are dropped."""
        return TimedRun.of(pipe(workload.texts(round_index), **workload.options(round_index, policy)))

    def entry(self, policy: Policy, own: Sequence[TimedRun], baseline: Sequence[TimedRun] | None) -> Entry:
        """Times, FLOPs, share of the peak, and with a baseline the ratios."""
        values = {f"ms.{part}": [getattr(run.ms, part) for run in own] for part in Milliseconds.__slots__}
        values["ms.rest"] = [run.rest_ms for run in own]
        values["flops.run"] = [float(run.flops_run) for run in own]
        values["flops.full"] = [float(run.flops_full) for run in own]
        if any(run.refiner_flops for run in own):
            values["flops.refiner"] = [float(run.refiner_flops) for run in own]
        values["flops_ratio"] = [run.flops_run / run.flops_full for run in own]
        if self.peak_flops_per_s is not None:
            values["peak_share"] = [1e3 * r.transformer_flops / r.ms.transformer / self.peak_flops_per_s for r in own]
        values |= {} if baseline is None else _ratios(own, baseline)
        return Entry(
            policy=policy.spec,
            fingerprint=policy.fingerprint,
            figures={name: Spread.of(numbers) for name, numbers in values.items()},
            numbers=_numbers(own),
            scales=_scales(own),
        )


def _ratios(own: Sequence[TimedRun], baseline: Sequence[TimedRun]) -> dict[str, list[float]]:
    """Per round: how many times faster, the FLOP-bound speedup, and the efficiency, measured over FLOP-bound.

    The last two are of the transformer alone: what a refiner takes and spends is in neither.
    """
    pairs = list(zip(own, baseline, strict=True))
    transformer = [b.ms.transformer / o.ms.transformer for o, b in pairs]
    by_flops = [b.transformer_flops / o.transformer_flops for o, b in pairs]
    is_refined = all(run.ms.refiner > 0 for pair in pairs for run in pair)
    return {
        "speedup.transformer": transformer,
        **({"speedup.refiner": [b.ms.refiner / o.ms.refiner for o, b in pairs]} if is_refined else {}),
        "speedup.decoder": [b.ms.decoder / o.ms.decoder for o, b in pairs],
        "speedup.end_to_end": [b.ms.total / o.ms.total for o, b in pairs],
        "speedup.by_flops": by_flops,
        "efficiency": [measured / promised for measured, promised in zip(transformer, by_flops, strict=True)],
    }


def _numbers(own: Sequence[TimedRun]) -> dict[str, float | None]:
    """Offline throughput: all images over all time. At batch 1 also the percentiles of single-stream latency."""
    seconds = sum(run.ms.total for run in own) / 1e3
    found: dict[str, float | None] = {"images_per_s": sum(run.num_images for run in own) / seconds}
    if own[0].num_images == 1:
        percentiles = supported_percentiles([run.ms.total for run in own])
        found |= {f"single_stream_ms.p{p}": value for p, value in percentiles.items()}
    return found


def _scales(own: Sequence[TimedRun]) -> tuple[ScaleFigures, ...]:
    return tuple(
        ScaleFigures(
            scale=runs[0].scale,
            grid=runs[0].grid,
            ms=Spread.of([run.ms for run in runs]),
            flops=Spread.of([float(run.flops) for run in runs]).median,
            token_blocks=Spread.of([float(run.token_blocks) for run in runs]).median,
            blocks=Spread.of([float(run.blocks) for run in runs]).median,
        )
        for runs in zip(*(run.scales for run in own), strict=True)
    )
