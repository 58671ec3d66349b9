"""Spreads, percentiles, turns and ratios, against values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from foveate.bench.peak import matmul_peak, weight_bandwidth
from foveate.bench.rounds import Stop, alternate
from foveate.bench.spread import Spread, runs_for, supported_percentiles
from foveate.bench.timing import TimedRun, Timing
from foveate.bench.workload import Workload
from foveate.core.cost import scale_flops
from foveate.engine.report import Milliseconds
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.full import Full
from foveate.policies.registry import load_policy


def timed(transformer: float, flops: int, num_images: int = 1) -> TimedRun:
    ms = Milliseconds(text=1.0, transformer=transformer, decoder=2.0, total=transformer + 5.0)
    return TimedRun(num_images=num_images, ms=ms, flops_run=flops, flops_full=1000, kv_bytes=0, scales=())


def test_spread_is_linear_between_neighbours() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, p10=1.2, p90=2.8)
    assert Spread.of([7.0]) == Spread(median=7.0, p10=7.0, p90=7.0)


def test_a_percentile_needs_a_run_beyond_it() -> None:
    assert [runs_for(p) for p in (50, 90, 99)] == [2, 10, 100]
    assert supported_percentiles([1.0]) == {50: None, 90: None, 99: None}
    ten = supported_percentiles([float(i) for i in range(10)])
    assert (ten[50], ten[99]) == (4.5, None)
    assert ten[90] == pytest.approx(8.1)
    hundred = supported_percentiles([float(i) for i in range(100)])
    assert hundred[99] == pytest.approx(98.01)


def test_sides_take_turns_and_the_warm_up_is_dropped() -> None:
    calls: list[tuple[int, int]] = []
    rounds_seen: list[int] = []

    def once(side: int, index: int) -> str:
        calls.append((side, index))
        return f"{side}{index}"

    rounds = alternate(once, 2, runs=2, warmup=1, after_round=lambda: rounds_seen.append(len(calls)))
    assert calls == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert rounds_seen == [2, 4, 6]
    assert rounds.rounds == (("01", "11"), ("02", "12"))
    assert rounds.of(1) == ["11", "12"]
    assert rounds.stopped is None


@pytest.mark.parametrize(
    ("error", "stop"),
    [(KeyboardInterrupt(), Stop.INTERRUPTED), (torch.OutOfMemoryError("no"), Stop.OUT_OF_MEMORY)],
)
def test_what_is_complete_survives_a_stop(error: BaseException, stop: Stop) -> None:
    def once(side: int, index: int) -> int:
        if (side, index) == (1, 2):
            raise error
        return index

    rounds = alternate(once, 2, runs=5, warmup=1, after_round=lambda: None)
    assert rounds.rounds == ((1, 1),)
    assert rounds.stopped is stop


def test_other_errors_pass() -> None:
    def once(side: int, index: int) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        alternate(once, 1, runs=1, warmup=0, after_round=lambda: None)


def test_ratios_are_formed_within_a_round() -> None:
    # The machine is three times slower in the second round; neither ratio may notice.
    baseline = [timed(10.0, 800), timed(30.0, 800)]
    own = [timed(5.0, 200), timed(15.0, 200)]
    entry = Timing(peak_flops_per_s=1e6).entry(Full(), own, baseline)
    assert entry.figures["speedup.transformer"] == Spread(median=2.0, p10=2.0, p90=2.0)
    assert entry.figures["speedup.by_flops"].median == 4.0
    assert entry.figures["efficiency"] == Spread(median=0.5, p10=0.5, p90=0.5)
    assert entry.figures["speedup.end_to_end"].p90 == pytest.approx(0.9 * 35 / 20 + 0.1 * 15 / 10)
    assert entry.figures["flops_ratio"].median == 0.2
    assert entry.figures["ms.rest"].median == 2.0
    # 200 FLOPs in 5 ms are 40,000 a second, in 15 ms a third of that; the peak is a million.
    assert entry.figures["peak_share"].median == pytest.approx((0.04 + 0.04 / 3) / 2)
    assert entry.numbers["images_per_s"] == pytest.approx(2 / 0.030)
    assert entry.numbers["single_stream_ms.p50"] == 15.0
    assert entry.numbers["single_stream_ms.p90"] is None


def test_a_refiner_is_told_apart_and_in_no_efficiency() -> None:
    baseline, own = timed(10.0, 800), timed(5.0, 500)
    runs = [
        replace(run, ms=replace(run.ms, refiner=ms, total=run.ms.total + ms), refiner_flops=flops)
        for run, ms, flops in ((own, 1.0, 300), (baseline, 4.0, 400))
    ]
    entry = Timing(peak_flops_per_s=1e6).entry(Full(), runs[:1], runs[1:])
    medians = {name: spread.median for name, spread in entry.figures.items()}
    assert (medians["ms.refiner"], medians["speedup.refiner"], medians["flops.refiner"]) == (1.0, 4.0, 300.0)
    assert (medians["speedup.by_flops"], medians["efficiency"], medians["peak_share"]) == (2.0, 1.0, 0.04)
    assert (medians["flops_ratio"], medians["ms.rest"]) == (0.5, 2.0)
    plain = Timing(peak_flops_per_s=1e6).entry(Full(), [own], [baseline])
    assert plain.figures["ms.refiner"].median == 0
    assert not {"speedup.refiner", "flops.refiner"} & set(plain.figures)


def test_baseline_and_batches_leave_out_what_they_cannot_say() -> None:
    entry = Timing(peak_flops_per_s=None).entry(Full(), [timed(10.0, 800, num_images=4)], None)
    assert not {"efficiency", "peak_share"} & set(entry.figures)
    assert not [name for name in entry.figures if name.startswith("speedup")]
    assert set(entry.numbers) == {"images_per_s"}
    assert entry.numbers["images_per_s"] == pytest.approx(4 / 0.015)


@pytest.mark.parametrize("spec", ["full", "skip-scales:count=2", "drop-branch:count=1", "depthvar", "ld-pruning"])
def test_flops_of_the_scales_add_up_to_those_of_the_call(toy_pipe: Pipeline, spec: str) -> None:
    output = toy_pipe("a red cat", seed=1, policy=load_policy(spec), output_type="np")
    trace = output.trace
    flops = scale_flops([scale.work for scale in trace.scales], trace.shape, trace.text_tokens)
    assert sum(flops) == output.report.flops_run
    run = TimedRun.of(output)
    assert [scale.flops for scale in run.scales] == flops
    assert sum(scale.ms for scale in run.scales) == pytest.approx(run.ms.transformer)
    assert [scale.flops == 0 for scale in run.scales] == [scale.token_blocks == 0 for scale in run.scales]
    assert run.rest_ms >= 0


def test_rounds_draw_the_same_under_every_policy_and_something_new_each_time() -> None:
    workload = Workload(batch=2, prompts=("a", "b", "c"), seed=5, pixels="0.06M")
    assert [workload.texts(i) for i in range(2)] == [["a", "b"], ["c", "a"]]
    seeds = [workload.options(i, Full())["seed"] for i in range(3)]
    assert seeds == [[5, 6], [7, 8], [9, 10]]
    assert workload.options(0, Full())["pixels"] == "0.06M"


def test_peak_and_bandwidth_are_rates_of_this_machine() -> None:
    cpu = torch.device("cpu")
    peak = matmul_peak(torch.float32, cpu, (16, 256))
    assert peak.tried == (16, 256)
    assert peak.size in peak.tried
    # The slowest machine that could run the tests, and more than any has.
    assert 1e7 < peak.flops_per_s < 1e16
    assert 1e6 < weight_bandwidth(torch.float32, cpu, 256) < 1e14
    assert math.isfinite(matmul_peak(torch.bfloat16, cpu, (16,)).flops_per_s)
