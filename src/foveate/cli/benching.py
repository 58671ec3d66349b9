"""What `foveate bench` does once its flags are read: measures, prints, and writes the files of a report."""

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from foveate.bench.calibrate import profile
from foveate.bench.page import facts, main_table, markdown
from foveate.bench.peak import BANDWIDTH_SIZE, weight_bandwidth
from foveate.bench.report import BenchReport
from foveate.bench.rounds import Stop
from foveate.bench.run import BenchPlan, run_bench
from foveate.bench.workload import Workload, default_prompt
from foveate.cli.bench import BenchOptions
from foveate.cli.console import (
    SCHEMA_VERSION,
    in_units,
    print_facts,
    print_gap,
    print_json,
    print_paths,
    print_table,
    warn,
)
from foveate.cli.loading import open_pipeline
from foveate.cli.main import BAD_USAGE, INTERRUPTED
from foveate.cli.options import ModelOptions, SizeOptions
from foveate.cli.staging import Staging
from foveate.core.errors import FoveateError
from foveate.policies.registry import load_policy

_FILES = ("bench.json", "bench.csv", "bench.svg", "bench.md")
_PROFILE = "profile.json"


def run(
    kind: str,
    pictures: Sequence[SizeOptions],
    batches: Sequence[int],
    prompts: Sequence[str] | None,
    model: ModelOptions,
    options: BenchOptions,
) -> int:
    """Measures, prints and writes.

    Returns:
        0; 130 after Ctrl-C and 2 if memory ran out, both with what was measured until then.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be written.
    """
    is_profile = kind == "calibrate"
    if options.output is not None and not is_profile:
        _require_matplotlib()
    policies = tuple(load_policy(policy) for policy in options.policy or ["full"])
    with Staging(options.output, [_PROFILE] if is_profile else _FILES) as staging:
        # The bar of a call would be drawn while the call is timed.
        pipe = open_pipeline(model, is_quiet=True)
        texts = (default_prompt(pipe),) if prompts is None else tuple(prompts)
        plan = BenchPlan(
            kind=kind,
            policies=policies,
            workloads=tuple(_workload(p, batch, texts, options.seed) for p in pictures for batch in batches),
            runs=options.runs,
            warmup=options.warmup,
            command=shlex.join(["foveate", *sys.argv[1:]]),
        )
        report = run_bench(pipe, plan, hides_progress=True if options.quiet else None)
        bandwidth = weight_bandwidth(pipe.model.dtype, pipe.model.device, BANDWIDTH_SIZE) if is_profile else None
        data = report.to_json() if bandwidth is None else profile(report, bandwidth)
        written: Collection[Path] = ()
        try:
            if options.output is not None:
                _write(staging, report, data)
                written = staging.publish().values()
        finally:
            # Minutes of measuring are not lost with a file that cannot be written.
            if options.as_json:
                print_json(data)
            else:
                _print(report, bandwidth, written)
    return _code(report, plan)


def _require_matplotlib() -> None:
    """Says what is missing before anything is measured."""
    if find_spec("matplotlib") is None:
        raise FoveateError(
            '--output also draws a plot and needs matplotlib, which is not installed: pip install "foveate[eval]"; '
            "--json needs nothing"
        )


def _workload(picture: SizeOptions, batch: int, prompts: tuple[str, ...], seed: int) -> Workload:
    return Workload(
        batch=batch,
        prompts=prompts,
        seed=seed,
        size=picture.width_and_height(),
        aspect_ratio=picture.aspect_ratio,
        pixels=picture.pixels,
    )


def _write(staging: Staging, report: BenchReport, data: dict[str, object]) -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1, ensure_ascii=False) + "\n"
    if report.kind == "calibrate":
        staging.path(_PROFILE).write_text(text, encoding="utf-8")
        return
    as_json, table, plot, page = _FILES
    staging.path(as_json).write_text(text, encoding="utf-8")
    staging.path(table).write_text(report.to_csv(), encoding="utf-8")
    from foveate.bench.plot import draw  # noqa: PLC0415 - of the extra `eval`

    draw(report, staging.path(plot))
    staging.path(page).write_text(markdown(report, plot), encoding="utf-8")


def _print(report: BenchReport, bandwidth: float | None, written: Collection[Path]) -> None:
    rate = [] if bandwidth is None else [("weights are read at", f"{in_units(bandwidth, 'B')}/s")]
    print_facts([*facts(report), *rate])
    print_gap()
    print_table(*main_table(report))
    print_gap()
    print_facts(("not included", text) for text in report.excluded)
    print_paths(written)


def _code(report: BenchReport, plan: BenchPlan) -> int:
    if report.stopped is None:
        return 0
    wanted = len(plan.workloads) * plan.runs
    there = sum(case.rounds for case in report.cases)
    warn(f"{report.stopped} after {there} of {wanted} rounds; the report holds only these")
    return INTERRUPTED if report.stopped is Stop.INTERRUPTED else BAD_USAGE
