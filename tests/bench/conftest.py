"""A measurement of the toy that all tests of a kind share."""

from collections.abc import Callable

import pytest

from foveate.bench.calibrate import CALIBRATION
from foveate.bench.report import BenchReport
from foveate.bench.run import BenchPlan, run_bench
from foveate.bench.workload import Workload
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy


def make_plan(kind: str, *specs: str, batches: tuple[int, ...] = (1,), runs: int = 2, warmup: int = 1) -> BenchPlan:
    """Small images of the toy; the command is what a page shows."""
    return BenchPlan(
        kind=kind,
        policies=tuple(load_policy(spec) for spec in specs),
        workloads=tuple(Workload(batch=batch, prompts=("a red cat", "two dogs")) for batch in batches),
        runs=runs,
        warmup=warmup,
        command=f"foveate bench {kind}",
    )


@pytest.fixture(scope="session")
def toy_report(toy_pipe: Pipeline) -> Callable[[str], BenchReport]:
    """Reports by kind, each measured once."""
    toy_pipe.set_progress_bar_config(disable=True)
    known: dict[str, BenchReport] = {}

    def report(kind: str) -> BenchReport:
        if kind not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("foveate.bench.run.MATMUL_SIZES", (32, 64))
                specs = CALIBRATION if kind == "calibrate" else ("full", "skip-scales:count=3", "drop-branch:count=1")
                plan = make_plan(kind, *specs, batches=(1, 2) if kind == "throughput" else (1,))
                known[kind] = run_bench(toy_pipe, plan, hides_progress=True)
        return known[kind]

    return report
