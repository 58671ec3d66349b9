"""`foveate bench serve`: load on a server, and how soon and how many images came."""

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from foveate.cli.console import SCHEMA_VERSION, note, print_facts, print_gap, print_json, print_paths, print_table, warn
from foveate.cli.main import INTERRUPTED
from foveate.cli.options import ModelOptions, SizeOptions
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.pipeline.option_texts import numbers

if TYPE_CHECKING:
    import foveate.bench.load_report
    import foveate.bench.serve
    import foveate.cli.bench
    import foveate.cli.staging

LOAD = Group.create_ordered("Load, of serve")

FILES = ("bench.json", "bench.svg", "bench.md")

_KEYS = "FOVEATE_API_KEYS"
_CONCURRENCY = (8,)
"""Without any other load."""

_ROUNDS = 1


@Parameter(name="*", group=LOAD)
@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """What load a server gets.

    Attributes:
        url: A server that runs; default: one is started on loopback, with the model and the machine's flags.
        serve_flags: Flags for the server that is started, such as "--max-queue 16".
        concurrency: Closed loop: so many clients, each with one request at a time; several with commas. Default: 8,
            unless --rate is given.
        rate: Open loop: so many requests per second, at random (Poisson) from --seed.
        load: Open loop: so many times what the first closed loop completes, which then takes a minute at most.
        seconds: Of each kind of load and round.
        count: Requests of each at most.
        images: Of one request.
        partials: Partial images of each image, 0 to 3.
        goal_ms: Requests that take longer are no goodput; default: every completed one is.
        timeout: Seconds without a byte behind which a request has failed.
        api_key_file: A file whose first line is the key; default: the first of FOVEATE_API_KEYS.
    """

    url: str | None = None
    serve_flags: Annotated[str, Parameter(allow_leading_hyphen=True)] = ""
    concurrency: list[str] | None = None
    rate: float | None = None
    load: float | None = None
    seconds: float = 30.0
    count: int = 10_000
    images: Annotated[int, Parameter(name=["--images", "-n"])] = 1
    partials: int = 1
    goal_ms: float | None = None
    timeout: float = 120.0
    api_key_file: Path | None = None


DEFAULT = LoadOptions()


def changed_flag(load: LoadOptions) -> str:
    """The first flag of load that was given."""
    names = (field.name for field in fields(load) if getattr(load, field.name) != getattr(DEFAULT, field.name))
    return next(names).replace("_", "-")


def bench_serve(options: "foveate.cli.bench.BenchOptions", model: ModelOptions, load: LoadOptions) -> int:
    """Measures, prints and writes.

    Returns:
        0, or 130 after Ctrl-C, with the rounds that were complete.

    Raises:
        FoveateError: A flag is out of range, or the server does not start or answer.
    """
    from foveate.bench.serve import run_load  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.cli.staging import Staging  # noqa: PLC0415

    plan, key = _plan(options, load), _key(load)
    if load.url is not None and model != ModelOptions():
        raise FoveateError("--url names a server that has its model; leave out the flags of the model and the machine")
    with Staging(options.output, FILES) as staging, _server(load, model) as url:
        report = run_load(url, key, plan, (lambda _: None) if options.quiet else note)
        if not report.sides:
            warn(f"{report.stopped} before the first round was complete; nothing is reported")
            return INTERRUPTED
        written: Collection[Path] = ()
        try:
            if options.output is not None:
                _write(staging, report)
                written = staging.publish().values()
        finally:
            if options.as_json:
                print_json(report.to_json())
            else:
                _print(report, written)
    if report.stopped is None:
        return 0
    warn(f"{report.stopped} after {len(report.sides[0])} of {plan.runs} rounds; the report holds only these")
    return INTERRUPTED


def _plan(options: "foveate.cli.bench.BenchOptions", load: LoadOptions) -> "foveate.bench.serve.LoadPlan":
    from foveate.bench.load import Calls  # noqa: PLC0415
    from foveate.bench.serve import LoadPlan  # noqa: PLC0415
    from foveate.bench.workload import DEFAULT_PROMPT  # noqa: PLC0415

    for flag in ("aspect_ratio", "batch"):
        if getattr(options, flag) is not None:
            raise FoveateError(f"serve takes no --{flag.replace('_', '-')}; --size WxH and --images say it")
    for flag in ("rate", "load", "seconds", "count", "images", "goal_ms", "timeout"):
        value = getattr(load, flag)
        if value is not None and not value > 0:
            raise FoveateError(f"--{flag.replace('_', '-')} must be above 0, got {value:g}")
    prompts = (DEFAULT_PROMPT,) if options.prompts is None else tuple(read_prompt_file(options.prompts))
    return LoadPlan(
        calls=Calls(
            prompts=prompts,
            policies=tuple(options.policy or [None]),
            sizes=tuple(map(_size, options.size)) if options.size else (None,),
            seed=options.seed,
            images=load.images,
            partials=load.partials,
        ),
        concurrency=_concurrency(load),
        rate=load.rate,
        load=load.load,
        seconds=load.seconds,
        count=load.count,
        runs=_ROUNDS if options.runs is None else options.runs,
        warmup=options.warmup,
        goal_ms=load.goal_ms,
        timeout_s=load.timeout,
        command=shlex.join(["foveate", *sys.argv[1:]]),
    )


def _size(size: str) -> str:
    """A size as requests have it."""
    pixels = SizeOptions(size=size).width_and_height()
    if pixels is None:
        raise FoveateError(f"--size must be WIDTHxHEIGHT for serve, got {size!r}")
    return "x".join(map(str, pixels))


def _concurrency(load: LoadOptions) -> tuple[int, ...]:
    given = numbers("--concurrency", load.concurrency, int)
    if given is None:
        return _CONCURRENCY if load.rate is None else ()
    values = tuple(dict.fromkeys(given if isinstance(given, list) else [given]))
    if min(values) < 1:
        raise FoveateError(f"--concurrency must be 1 or more, got {min(values)}")
    if load.load is not None and len(values) > 1:
        raise FoveateError("--load is a multiple of one closed loop; give one --concurrency")
    return values


def _key(load: LoadOptions) -> str | None:
    """The API key; it is never printed."""
    keys = os.environ.get(_KEYS, "").split(",")
    if load.api_key_file is not None:
        keys = [
            line for line in load.api_key_file.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
        ]
        if not keys:
            raise FoveateError(f"{load.api_key_file} holds no key; write it into the first line")
    return keys[0].strip() or None


@contextmanager
def _server(load: LoadOptions, model: ModelOptions) -> Iterator[str]:
    """The address of the server that is measured."""
    from foveate.bench.load_server import started  # noqa: PLC0415

    if load.url is not None:
        yield load.url.rstrip("/")
        return
    keys = [] if load.api_key_file is None else ["--api-keys", str(load.api_key_file)]
    with started([*_flags(model), *keys, *shlex.split(load.serve_flags)]) as own:
        yield own.url


def _flags(model: ModelOptions) -> Sequence[str]:
    """The flags that mean the same model on the same machine."""
    default, words = ModelOptions(), []
    for field in fields(model):
        value = getattr(model, field.name)
        if value != getattr(default, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return words


def _write(staging: "foveate.cli.staging.Staging", report: "foveate.bench.load_report.LoadReport") -> None:
    from foveate.bench.load_plot import draw_load  # noqa: PLC0415 - of the extra `eval`
    from foveate.bench.load_report import markdown  # noqa: PLC0415

    as_json, plot, page = FILES
    data = {"schema_version": SCHEMA_VERSION, **report.to_json()}
    staging.path(as_json).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_load(report, staging.path(plot))
    staging.path(page).write_text(markdown(report, plot), encoding="utf-8")


def _print(report: "foveate.bench.load_report.LoadReport", written: Collection[Path]) -> None:
    from foveate.bench.load_report import notes, table  # noqa: PLC0415

    print_table(*table(report))
    print_gap()
    print_facts(notes(report))
    print_paths(written)
