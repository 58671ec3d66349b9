"""`foveate batch`: images for every row of a file, resumable, into shards with a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from foveate.cli.console import in_units, note, print_facts, print_json
from foveate.cli.options import (
    MACHINE,
    OUTPUT,
    PICTURE,
    BatchFlags,
    ConfigFlag,
    JsonFlag,
    ModelOptions,
    QuietFlag,
    SizeOptions,
    options_of,
)
from foveate.core.errors import FoveateError
from foveate.pipeline.options import Options, checked

if TYPE_CHECKING:
    from foveate.bulk.run import Run, Tally
    from foveate.bulk.settings import RunSettings
    from foveate.pipeline.loading import Loading
    from foveate.pipeline.pipeline import Pipeline

_SECONDS_OF_DAY = 86_400

_MOST = 2**53
"""Of any count."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class BatchOptions:
    """What is read and written, and by how many.

    Attributes:
        output: Folder for shards, manifest and failed.jsonl; the same command goes on there.
        column: A column of the input under another name, such as prompt=caption; may be repeated.
        num_images: Images of a row that does not say; default: 1, or as many as the scorer of --prompts-set wants.
        seed: Rows without a seed get one from this and their id.
        limit: Read only the first rows.
        prompts_set: INPUT is the file of an evaluation set; images also go into the folder that its scorer reads,
            OUTPUT/SET.
        shard: k/n: make every n-th shard, from the k-th on; for the jobs of an array.
        shard_size: Rows of a shard.
        shard_format: Of shards: tar, as WebDataset reads it, or parquet.
        format: Of images: png, jpg or webp.
        quality: Of jpg and webp, 1 to 100; default: 95.
        lossless: Keep every pixel of a webp.
        psnr_to_full: Also generate every image in full and store the PSNR; twice the time.
        batch_size: Images generated at once; default: what fits into memory, 16 at most.
        retries: How often an image that failed is tried again, alone.
        retry_failed: Also try again what failed before.
        max_failures: End the run if more images fail, those of earlier times included.
        dry_run: Say what the run will take in time, FLOPs, memory and disk; generates a few images and writes nothing.
        engine: local: this process. ray: workers on a Ray cluster.
        address: Of a Ray cluster; default: one that is started here.
        num_workers: Ray workers.
        gpus_per_worker: GPUs of a Ray worker, such as 1 or 0.5.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    output: Annotated[Path, Parameter(name=["--output", "-o"], group=OUTPUT)]
    column: list[str] | None = None
    num_images: Annotated[int | None, Parameter(name=["--num-images", "-n"])] = None
    seed: int = 0
    limit: int | None = None
    prompts_set: Literal["geneval", "dpg", "parti", "drawbench", "hps", "imagereward"] | None = None
    shard: str = "1/1"
    shard_size: Annotated[int, Parameter(group=OUTPUT)] = 1000
    shard_format: Annotated[Literal["tar", "parquet"], Parameter(group=OUTPUT)] = "tar"
    format: Annotated[Literal["png", "jpg", "webp"], Parameter(group=OUTPUT)] = "png"
    quality: Annotated[int | None, Parameter(group=OUTPUT)] = None
    lossless: Annotated[bool, Parameter(group=OUTPUT)] = False
    psnr_to_full: Annotated[bool, Parameter(group=OUTPUT)] = False
    batch_size: Annotated[int | None, Parameter(group=MACHINE)] = None
    retries: Annotated[int, Parameter(group=MACHINE)] = 1
    retry_failed: Annotated[bool, Parameter(group=MACHINE)] = False
    max_failures: Annotated[int | None, Parameter(group=MACHINE)] = None
    dry_run: Annotated[bool, Parameter(group=OUTPUT)] = False
    engine: Annotated[Literal["local", "ray"], Parameter(group=MACHINE)] = "local"
    address: Annotated[str | None, Parameter(group=MACHINE)] = None
    num_workers: Annotated[int | None, Parameter(group=MACHINE)] = None
    gpus_per_worker: Annotated[float | None, Parameter(group=MACHINE)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None

    @property
    def columns(self) -> dict[str, str]:
        """Names of options, and of the columns that hold them.

        Raises:
            FoveateError: A flag is not NAME=COLUMN, or names an option twice.
        """
        found: dict[str, str] = {}
        for text in self.column or []:
            name, equals, column = text.partition("=")
            if not (name and equals and column):
                raise FoveateError(f"--column must be NAME=COLUMN, such as prompt=caption, got {text!r}")
            if name in found:
                raise FoveateError(f"--column names {name} twice; leave one out")
            found[name] = column
        return found


_MODEL, _SIZE, _CALL = ModelOptions(), SizeOptions(), BatchFlags()


def batch(
    source: Annotated[Path, Parameter(name="INPUT", group=PICTURE)],
    /,
    *,
    options: BatchOptions,
    call: BatchFlags = _CALL,
    size: SizeOptions = _SIZE,
    model: ModelOptions = _MODEL,
) -> int:
    """Generate an image or more for every row of a file, resumable, into shards with a manifest.

    Args:
        source: jsonl, json, csv, tsv, parquet or txt, also .gz, or a folder of them. Columns: prompt, id, and any
            option of a call; all others are kept in the manifest.
        options: What is read and written, and by how many.
        call: How images of rows that say nothing else are generated.
        size: How large they are.
        model: Which model runs, and on what.
    """
    own: Options = {
        "seed": options.seed,
        "num_images_per_prompt": 1 if options.num_images is None else options.num_images,
    }
    asked: Options = {**size.options(), **options_of(call), **own}
    _check(asked, options)
    return _run(source, asked, model, options)


def _check(call: Options, options: BatchOptions) -> None:
    """Checks that need no imports.

    Raises:
        FoveateError: An option that no model could take, or a flag out of range.
    """
    checked(call)
    leasts = {"limit": 1, "shard_size": 1, "batch_size": 1, "retries": 0, "max_failures": 0, "num_workers": 1,
              "gpus_per_worker": 0}  # fmt: skip
    for name, least in leasts.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= _MOST:
            raise FoveateError(f"--{name.replace('_', '-')} must be {least} to {_MOST}, got {value}")
    if options.engine == "local":
        for name in ("address", "num_workers", "gpus_per_worker"):
            if getattr(options, name) is not None:
                raise FoveateError(f"--{name.replace('_', '-')} is for --engine ray; add it, or leave the flag out")


def _run(path: Path, call: Options, model: ModelOptions, options: BatchOptions) -> int:
    """Reads, loads and generates.

    Returns:
        0, or 1 if rows failed.
    """
    from foveate.bulk.output import OutputFolder  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.bulk.run import Bar, Part, Run  # noqa: PLC0415
    from foveate.bulk.sets import write_layout  # noqa: PLC0415
    from foveate.bulk.settings import described  # noqa: PLC0415

    part, columns = Part.parsed(options.shard), options.columns
    if path.is_dir() and options.output.resolve().is_relative_to(path.resolve()):
        raise FoveateError(f"--output {options.output} lies in the input folder {path}; take a folder beside it")
    source, scan = _opened(path, columns, options)
    settings = _settings(call, model, options)
    is_elsewhere = options.engine == "ray" and not options.dry_run
    loading = settings.loading.on_cpu() if is_elsewhere else settings.loading
    pipe = loading.open()
    _check_run(pipe, settings)
    config = settings.config(
        described(pipe, settings.loading),
        input={"name": source.name, "sha256": scan.sha256, "rows": scan.num_rows},
        columns=columns,
        limit=options.limit,
        set=options.prompts_set,
    )
    numbers = part.shards(-(-scan.num_rows // options.shard_size))
    if options.dry_run:
        return _forecast(pipe, settings, source, _left(numbers, options.output, config), options)
    output = OutputFolder.create(options.output, config)
    with output.locked(part.lock):
        if options.retry_failed:
            output.reopen_failed(numbers)
        published = output.published()
        left = [number for number in numbers if number not in published]
        rows = sum(min(options.shard_size, scan.num_rows - number * options.shard_size) for number in left)
        before = output.num_failed() if options.max_failures is not None else 0
        bar = Bar(rows * settings.images_per_row, is_hidden=True if options.quiet else None, failed_before=before)
        run = Run(settings=settings, source=source, output=output, shards=left, bar=bar)
        try:
            tally = _generate(None if is_elsewhere else pipe, run, options)
        finally:
            num_failed = output.write_failed()
        if options.prompts_set is not None:
            with output.turn("layout"):
                write_layout(options.prompts_set, output, options.output / options.prompts_set, note)
    return _conclude(output, tally, len(numbers), num_failed, options)


def _opened(path: Path, columns: dict[str, str], options: BatchOptions) -> tuple[Any, Any]:
    """The input, read once."""
    from foveate.bulk.sets import open_set  # noqa: PLC0415
    from foveate.bulk.sources import open_source  # noqa: PLC0415

    if options.prompts_set is not None:
        if columns:
            raise FoveateError(f"--prompts-set {options.prompts_set} knows its columns; leave --column out")
        return open_set(options.prompts_set, path, options.limit)
    source, scan = open_source(path, columns, options.shard_size, options.limit)
    if not options.quiet:
        for line in scan.notes:
            note(line)
    return source, scan


def _threaded(loading: "Loading", options: BatchOptions) -> "Loading":
    """With the number of CPU threads, which the configuration holds: by default torch's, or a Ray worker's share."""
    from foveate.bulk.ray_engine import RayWorkers  # noqa: PLC0415

    if options.engine == "ray" and loading.threads is None:
        workers = RayWorkers(address=options.address, count=options.num_workers or 1)
        return replace(loading, threads=max(1, int(workers.cpus_each)))
    return loading.with_threads()


def _settings(call: Options, model: ModelOptions, options: BatchOptions) -> Any:  # noqa: ANN401 - imported late
    """What decides the images; checked against the shapes of the model before its weights are read.

    Raises:
        FoveateError: A flag that the model refuses.
    """
    from foveate.bulk.sets import find_set  # noqa: PLC0415
    from foveate.bulk.settings import RunSettings  # noqa: PLC0415
    from foveate.cli.loading import check_call, loading_of, spec_of  # noqa: PLC0415
    from foveate.pipeline.call import draws_classes  # noqa: PLC0415
    from foveate.pipeline.encoding import Encoder  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    spec, policy = spec_of(model), load_policy(call["policy"])
    call = cast(Options, {**call, "policy": policy})
    if options.prompts_set is not None and options.num_images is None:
        call = cast(Options, {**call, "num_images_per_prompt": find_set(options.prompts_set).num_images})
    check_call("0" if draws_classes(spec) else "a", {**call, "num_images_per_prompt": 1}, [policy], spec)
    return RunSettings(
        loading=_threaded(loading_of(model), options),
        options=call,
        encoder=Encoder.for_file(f"x.{options.format}", options.quality, is_lossless=options.lossless),
        shard_format=options.shard_format,
        shard_size=options.shard_size,
        batch_size=options.batch_size,
        retries=options.retries,
        psnr_to_full=options.psnr_to_full,
    )


def _check_run(pipe: "Pipeline", settings: "RunSettings") -> None:
    """Refuses what every row that says nothing else would fail of.

    Raises:
        FoveateError: A budget that the policy does not reach, or a batch that does not fit into memory.
    """
    from foveate.pipeline.bulk import BulkSettings, batch_size_for  # noqa: PLC0415
    from foveate.pipeline.call import draws_classes  # noqa: PLC0415

    own: Options = {**settings.options, "num_images_per_prompt": 1}
    job = pipe.job("0" if draws_classes(pipe.model.spec) else "a", own)
    batch_size_for(pipe, job, BulkSettings(batch_size=settings.batch_size))


def _left(numbers: Sequence[int], folder: Path, config: dict[str, Any]) -> list[int]:
    """The shards that are not there yet; nothing is made.

    Raises:
        FoveateError: The folder has another configuration.
    """
    from foveate.bulk.output import OutputFolder  # noqa: PLC0415

    output = OutputFolder.peek(folder, config)
    published = set() if output is None else output.published()
    return [number for number in numbers if number not in published]


def _generate(pipe: "Pipeline | None", run: "Run", options: BatchOptions) -> "Tally":
    """Runs the shards that are left: here, or without a pipeline of this process on Ray."""
    from foveate.bulk.ray_engine import RayWorkers  # noqa: PLC0415
    from foveate.bulk.run import run_local, run_on_ray  # noqa: PLC0415

    try:
        if not run.shards:
            return run.bar.tally
        if pipe is not None:
            return run_local(pipe, run, max_failures=options.max_failures)
        workers = RayWorkers(
            address=options.address, count=options.num_workers or 1, gpus=options.gpus_per_worker or 0.0
        )
        return run_on_ray(run, workers, max_failures=options.max_failures)
    except BaseException:
        run.bar.close()
        note(f"what is done stays in {options.output}; the same command goes on")
        raise
    finally:
        run.bar.close()


def _forecast(pipe: Any, settings: Any, source: Any, left: list[int], options: BatchOptions) -> int:  # noqa: ANN401
    """Says what the run will take."""
    from foveate.bulk.forecast import forecast  # noqa: PLC0415

    found = forecast(pipe, settings, source, left)
    if options.as_json:
        print_json(found.to_json())
        return 0
    share = found.flops_run / found.flops_full if found.flops_full else 1.0
    print_facts(
        [
            ("rows", f"{found.rows:,}" + (f", {found.bad_rows:,} of them cannot run" if found.bad_rows else "")),
            ("images", f"{found.images:,} in {found.shards:,} shards"),
            ("time", f"{_duration(found.seconds)} in one process at the pace of {found.sampled_images} images"),
            ("FLOPs", f"{in_units(found.flops_run)} of {in_units(found.flops_full)} ({share:.1%})"),
            ("memory", f"{in_units(found.memory_bytes, 'B')} for the largest batch"),
            ("disk", in_units(found.disk_bytes, "B")),
            *(("will fail", error) for error in found.errors),
        ]
    )
    return 0


def _conclude(output: Any, tally: Any, num_shards: int, num_failed: int, options: BatchOptions) -> int:  # noqa: ANN401
    """Prints what was done; the exit code."""
    failed = output.path / "failed.jsonl"
    if options.as_json:
        print_json({"output": str(output.path), "shards": num_shards, "failed": num_failed, **tally.to_json()})
    else:
        saved = f", {1 - tally.flops_run / tally.flops_full:.1%} of the FLOPs saved" if tally.flops_full else ""
        print_facts(
            [
                ("output", f"{output.path}, {num_shards} shards"),
                ("images", f"{tally.images:,} now, {tally.images_per_s:.2f} a second{saved}"),
                *((("failed", f"{num_failed:,} of all, see {failed}"),) if num_failed else ()),
            ]
        )
    return 1 if num_failed else 0


def _duration(seconds: float) -> str:
    """Days, hours, minutes or seconds, two of them."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{seconds:.1f} s"
    parts = ((_SECONDS_OF_DAY, "d"), (3600, "h"), (60, "min"), (1, "s"))
    found = []
    for length, unit in parts:
        if whole >= length:
            found.append(f"{whole // length} {unit}")
            whole %= length
    return " ".join(found[:2])
