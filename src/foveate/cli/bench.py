"""`foveate bench`: time, throughput and memory of policies, load on a server, and a profile of this machine."""

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from foveate.cli.bench_serve import DEFAULT as NO_LOAD
from foveate.cli.bench_serve import LoadOptions, bench_serve, changed_flag
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
from foveate.cli.main import BAD_USAGE, INTERRUPTED
from foveate.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PICTURE,
    POLICY,
    ConfigFlag,
    JsonFlag,
    ModelOptions,
    QuietFlag,
    SizeOptions,
)
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.core.schedule import parse_ratio
from foveate.pipeline.option_texts import numbers

if TYPE_CHECKING:
    # Named in full in annotations, which the tests check: they import what stands there.
    import foveate.bench.report
    import foveate.bench.workload
    import foveate.cli.staging

_BATCHES = {"throughput": [1, 4, 16]}
"""Where not only batch 1 is measured by default."""

_ROUNDS = 10
_FILES = ("bench.json", "bench.csv", "bench.svg", "bench.md")
_PROFILE = "profile.json"

_ANY = "0"
"""A prompt that every model takes, to check the rest of a call."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What is measured, how often, and what is reported.

    Attributes:
        size: 0.06M, 0.25M, 0.60M or 1M pixels, or WxH such as 256x256; may be repeated. Default: the model's own.
        aspect_ratio: Width to height, such as 4:3, for a size that is not WxH; may be repeated.
        batch: Images generated at once; several with commas. Default: 1, and 1,4,16 for throughput.
        prompts: A file with one prompt a line, used in turn; default: one built-in prompt.
        seed: First seed; every image of a policy has its own.
        policy: A name, a spec such as skip-scales:count=2, or a YAML file; may be repeated.
            Ratios are against the first one. Default: full alone.
        runs: Measured rounds; every policy, or kind of load, runs once in each. Default: 10, and 1 for serve.
        warmup: Warm-up rounds, at every size and batch; requests before the first round for serve.
        output: Folder for bench.json, bench.csv (not of serve), bench.svg and bench.md; for calibrate, a copy of the
            profile.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    size: list[str] | None = None
    aspect_ratio: list[str] | None = None
    batch: list[str] | None = None
    prompts: Path | None = None
    seed: int = 0
    policy: Annotated[list[str] | None, Parameter(name=["--policy", "-p"], group=POLICY)] = None
    runs: Annotated[int | None, Parameter(group=MEASUREMENT)] = None
    warmup: Annotated[int, Parameter(group=MEASUREMENT)] = 1
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None


_MODEL, _OPTIONS = ModelOptions(), BenchOptions()


def bench(
    kind: Annotated[Literal["latency", "throughput", "memory", "calibrate", "serve"], Parameter(group=MEASUREMENT)],
    /,
    *,
    options: BenchOptions = _OPTIONS,
    load: LoadOptions = NO_LOAD,
    model: ModelOptions = _MODEL,
) -> int:
    """Measure time, throughput or memory of policies, load on a server, or a profile of this machine.

    Args:
        kind: latency: time by part and scale. throughput: images per second by batch, and percentiles at batch 1.
            memory: weights, keys and values, and the rest. calibrate: what this machine takes, for --latency-budget-ms.
            serve: how soon and how many images a server sends under load.
        options: What is measured, how often, and what is reported.
        load: What load a server gets.
        model: Which model runs, and on what.
    """
    for flag, least in (("runs", 1), ("warmup", 0), ("seed", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise FoveateError(f"--{flag} must be {least} or more, got {value}")
    if kind != "serve" and load != NO_LOAD:
        raise FoveateError(f"{kind} puts no load on a server; leave out --{changed_flag(load)}, or measure serve")
    if kind == "calibrate" and options.policy is not None:
        raise FoveateError("calibrate measures policies of its own; leave out --policy")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise FoveateError(f"--output must be a folder, {options.output} is a file")
    if kind == "serve":
        if options.output is not None:
            _require_matplotlib()
        return bench_serve(options, model, load)
    pictures = sizes_of(options.size, options.aspect_ratio)
    batches = _batches(kind, options.batch)
    prompts = None if options.prompts is None else read_prompt_file(options.prompts)
    return _bench(kind, [(picture, batch) for picture in pictures for batch in batches], prompts, model, options)


def _bench(
    kind: str,
    pictures: Sequence[tuple[SizeOptions, int]],
    prompts: Sequence[str] | None,
    model: ModelOptions,
    options: BenchOptions,
) -> int:
    """Measures, prints and writes; every size comes with a batch.

    Returns:
        0; 130 after Ctrl-C and 2 if memory ran out, both with what was measured until then.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be written.
    """
    from foveate.bench import peak  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.bench.calibrate import CALIBRATION, profile  # noqa: PLC0415
    from foveate.bench.run import BenchPlan, run_bench  # noqa: PLC0415
    from foveate.bench.workload import default_prompt  # noqa: PLC0415
    from foveate.cli.loading import check_call, open_pipeline, spec_of  # noqa: PLC0415
    from foveate.cli.staging import Staging  # noqa: PLC0415
    from foveate.pipeline.profile import store_profile  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    is_profile = kind == "calibrate"
    if options.output is not None and not is_profile:
        _require_matplotlib()
    names = CALIBRATION if is_profile else options.policy or ["full"]
    policies, spec = tuple(load_policy(policy) for policy in names), spec_of(model)
    for picture, _ in pictures:
        check_call(prompts or _ANY, picture.options(), policies, spec)
    with Staging(options.output, [_PROFILE] if is_profile else _FILES) as staging:
        # The progress bar of a call would be drawn while the call is timed.
        pipe = open_pipeline(model, is_quiet=True)
        texts = (default_prompt(pipe),) if prompts is None else tuple(prompts)
        plan = BenchPlan(
            kind=kind,
            policies=policies,
            workloads=tuple(_workload(picture, batch, texts, options.seed) for picture, batch in pictures),
            runs=_ROUNDS if options.runs is None else options.runs,
            warmup=options.warmup,
            command=shlex.join(["foveate", *sys.argv[1:]]),
        )
        report = run_bench(pipe, plan, hides_progress=True if options.quiet else None)
        rate = peak.weight_bandwidth(pipe.model.dtype, pipe.model.device, peak.BANDWIDTH_SIZE) if is_profile else None
        data = report.to_json() if rate is None else profile(report, rate)
        written: Collection[Path] = ()
        try:
            if is_profile:
                written = [store_profile(data, pipe.model)]
            if options.output is not None:
                _write(staging, report, data)
                written = [*written, *staging.publish().values()]
        finally:
            # Minutes of measuring are not lost with a file that cannot be written.
            if options.as_json:
                print_json(data)
            else:
                _print(report, rate, written)
    return _code(report, len(plan.workloads) * plan.runs)


def _require_matplotlib() -> None:
    """Refuses before the measurement if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise FoveateError(
            '--output also writes a plot and needs matplotlib, which is not installed: pip install "foveate[eval]"; '
            "--json needs nothing"
        )


def _workload(
    picture: SizeOptions, batch: int, prompts: tuple[str, ...], seed: int
) -> "foveate.bench.workload.Workload":
    from foveate.bench.workload import Workload  # noqa: PLC0415

    return Workload(
        batch=batch,
        prompts=prompts,
        seed=seed,
        size=picture.width_and_height(),
        aspect_ratio=picture.aspect_ratio,
        pixels=picture.pixels,
    )


def _write(
    staging: "foveate.cli.staging.Staging", report: "foveate.bench.report.BenchReport", data: dict[str, object]
) -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1, ensure_ascii=False) + "\n"
    if report.kind == "calibrate":
        staging.path(_PROFILE).write_text(text, encoding="utf-8")
        return
    as_json, table, plot, page = _FILES
    staging.path(as_json).write_text(text, encoding="utf-8")
    staging.path(table).write_text(report.to_csv(), encoding="utf-8")
    from foveate.bench.page import markdown  # noqa: PLC0415
    from foveate.bench.plot import draw  # noqa: PLC0415 - of the extra `eval`

    draw(report, staging.path(plot))
    staging.path(page).write_text(markdown(report, plot), encoding="utf-8")


def _print(report: "foveate.bench.report.BenchReport", bandwidth: float | None, written: Collection[Path]) -> None:
    from foveate.bench.page import facts, main_table  # noqa: PLC0415

    rate = [] if bandwidth is None else [("weights are read at", f"{in_units(bandwidth, 'B')}/s")]
    print_facts([*facts(report), *rate])
    print_gap()
    print_table(*main_table(report))
    print_gap()
    print_facts(("not included", text) for text in report.excluded)
    print_paths(written)


def _code(report: "foveate.bench.report.BenchReport", wanted: int) -> int:
    """The exit code of a report when `wanted` rounds were asked for."""
    from foveate.bench.rounds import Stop  # noqa: PLC0415

    if report.stopped is None:
        return 0
    there = sum(case.rounds for case in report.cases)
    warn(f"{report.stopped} after {there} of {wanted} rounds; the report holds only these")
    return INTERRUPTED if report.stopped is Stop.INTERRUPTED else BAD_USAGE


def sizes_of(sizes: Sequence[str] | None, ratios: Sequence[str] | None) -> list[SizeOptions]:
    """Every size with every aspect ratio; a size as WxH stands by itself.

    Raises:
        FoveateError: Neither a budget of pixels nor WxH, an unknown ratio, or a ratio with nothing to apply to.
    """
    for ratio in ratios or []:
        parse_ratio(ratio)
    texts: Sequence[str | None] = sizes or [None]
    shapes: Sequence[str | None] = ratios or [None]
    found = [SizeOptions(size=size, aspect_ratio=ratio) for size in texts for ratio in shapes]
    for picture in found:
        picture.width_and_height()
    return found


def _batches(kind: str, texts: list[str] | None) -> list[int]:
    """The batches, each once, in the order given."""
    given = numbers("--batch", texts, int)
    if given is None:
        return _BATCHES.get(kind, [1])
    batches = given if isinstance(given, list) else [given]
    for batch in batches:
        if batch < 1:
            raise FoveateError(f"--batch must be 1 or more, got {batch}")
    return list(dict.fromkeys(batches))
