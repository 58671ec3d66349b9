"""What `foveate generate` does once its flags are read: draws in batches, writes what is done and reports."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from foveate.cli.console import in_units, note, print_facts, print_json, print_paths
from foveate.cli.generate import GenerateOptions
from foveate.cli.loading import call_options, open_pipeline
from foveate.cli.options import ModelOptions, SamplingOptions, SizeOptions, numbers
from foveate.cli.staging import Staging, slug
from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError, is_out_of_memory
from foveate.engine.report import Report
from foveate.families.loading import Origin, find_spec
from foveate.families.residency import Residency
from foveate.pipeline.bulk import (
    ALL_SCALES,
    LARGEST_BATCH,
    BulkSettings,
    DrawnBatch,
    add_reports,
    draw_rows,
    rows_of,
)
from foveate.pipeline.call import draws_classes
from foveate.pipeline.encoding import JPEG_TEXT_BYTES, Encoder, text_of
from foveate.pipeline.options import Options
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.provenance import save_image
from foveate.policies.registry import load_policy

_MAP, _TRACE = "-map.png", "-trace.json"
"""Endings of what `--trace` writes."""

_REST_BYTES = 16_384
"""Of a JPEG's metadata, what everything but prompts may take."""
_NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The files of one picture."""

    picture: Path
    seed: int
    prompt: str
    previews: tuple[Path, ...]
    map_: Path | None
    trace: Path | None


@dataclass(kw_only=True, slots=True)
class Done:
    """What a command has drawn and written so far; reports of batches are added up as they come."""

    written: list[Written] = field(default_factory=list)
    report: Report | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def count(self, output: PipelineOutput) -> None:
        """Adds a batch that is drawn."""
        self.report = output.report if self.report is None else add_reports(self.report, output.report)
        self.config = output.config


def refuse_numbers(prompts: Sequence[str], model: ModelOptions) -> None:
    """Refuses what was meant as a value of a flag; a class-conditional model takes numbers.

    Raises:
        FoveateError: A prompt for a model of texts is a number, or there is no such model.
    """
    number = next((prompt for prompt in prompts if _NUMBER.fullmatch(prompt.strip())), None)
    if number is None:
        return
    origin = Origin(
        name_or_path=model.model,
        autoencoder=model.autoencoder,
        text_encoder=model.text_encoder,
        revision=model.revision,
        local_files_only=model.local_files_only,
    )
    if not draws_classes(find_spec(origin)):
        raise FoveateError(
            f"the prompt {number!r} is a number; several values of a flag have commas, as in --seed 7,8, and a number "
            "to draw goes into a file for --prompts"
        )


def draw(
    prompts: Sequence[str],
    model: ModelOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    options: GenerateOptions,
) -> int:
    """Draws in batches, and writes every picture as soon as its batch is done.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written. Pictures that were done by then stay,
            and it says how many.
    """
    call, place = _options_of_call(size, sampling, options), options.place
    encoder = Encoder.for_file(f"x{place.suffix}", options.quality, is_lossless=options.lossless)
    _refuse_long_prompts(prompts, sampling.negative_prompt, encoder, options)
    done, total = Done(), len(prompts) * options.num_images
    with Staging(place.folder, [place.file] if place.file else []) as staging:
        if model.device is None and not options.quiet and torch.cuda.is_available():
            note("a GPU is here; --device cuda uses it")
        pipe = open_pipeline(model, is_quiet=options.quiet)
        with _saying_what_is_done(done, total, place.folder):
            rows = rows_of(list(prompts), pipe.model.spec, **call)
            with closing(draw_rows(pipe, rows, _how(model, options, total), **_of_all_rows(call))) as batches:
                for batch in batches:
                    done.count(batch.output)
                    _write_batch(staging, batch, done, encoder, options)
    _report(done, options.as_json)
    return 0


def _options_of_call(size: SizeOptions, sampling: SamplingOptions, options: GenerateOptions) -> Options:
    """Flags in the words of the pipeline; policies are read here, before any model is loaded."""
    return {
        **call_options(size, sampling),
        "policy": load_policy(options.policy),
        "seed": numbers("--seed", options.seed, int),
        "rng": options.rng,
        "num_images_per_prompt": options.num_images,
        "batch_invariant": options.batch_invariant,
        "trace": options.trace,
    }


def _of_all_rows(call: Options) -> Options:
    """What a row does not say itself."""
    rest = dict(call)
    for name in ("seed", "num_images_per_prompt", "negative_prompt"):
        del rest[name]
    return cast(Options, rest)


def _how(model: ModelOptions, options: GenerateOptions, total: int) -> BulkSettings:
    return BulkSettings(
        batch_size=options.batch_size,
        total=total,
        previews=ALL_SCALES if options.preview else 0,
        residency=Residency(offload=model.offload, release_text_encoder=model.release_text_encoder),
        hides_progress=True if options.quiet else None,
    )


def _refuse_long_prompts(
    prompts: Sequence[str], negative: str | None, encoder: Encoder, options: GenerateOptions
) -> None:
    """Finds before anything is drawn that prompts do not fit into a JPEG, which holds little beside its pixels."""
    if encoder.format != "jpeg":
        return
    # With its batch a file holds its own prompt and all prompts.
    held = 1 + (options.batch_size or LARGEST_BATCH) if options.store_batch else 1
    repeats = min(options.num_images, held)
    lengths = (length for prompt in prompts for length in repeat(len(text_of({"": [prompt, negative]})), repeats))
    if sum(nlargest(held, lengths)) > JPEG_TEXT_BYTES - _REST_BYTES:
        raise FoveateError(
            f"the prompts are too long to be stored in a jpeg, which holds {JPEG_TEXT_BYTES} bytes; write png or webp"
        )


@contextmanager
def _saying_what_is_done(done: Done, total: int, folder: Path) -> Iterator[None]:
    """Says behind whatever goes wrong how many pictures were written, as those stay.

    Raises:
        FoveateError: What came in one line. A mistake of this program is raised as it came.
    """
    try:
        yield
    except (FoveateError, OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, FoveateError | OSError) and not is_out_of_memory(error):
            raise
        if not done.written:
            raise
        raise FoveateError(f"{_reason(error)}; {len(done.written)} of {total} pictures are in {folder}") from error
    except KeyboardInterrupt:
        if done.written:
            note(f"{len(done.written)} of {total} pictures are in {folder}")
        raise


def _reason(error: Exception) -> str:
    if isinstance(error, FoveateError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    first = (str(error).splitlines() or ["no more could be had"])[0][:200]
    return f"not enough memory ({first}); try a smaller --batch-size"


def _write_batch(staging: Staging, batch: DrawnBatch, done: Done, encoder: Encoder, options: GenerateOptions) -> None:
    """Writes the pictures of a batch, also those behind one that cannot be written, and moves them to their place.

    Raises:
        FoveateError: A file could not be written; the first one that could not is named.
    """
    stems: list[str] = []
    problem: FoveateError | None = None
    hidden = staging.path("x").parent
    try:
        for index in range(len(batch.rows)):
            stems.append(_stem(staging, batch, index, options))
            try:
                _write(staging, batch, index, stems, encoder, options)
            except (FoveateError, OSError) as error:
                problem = problem or FoveateError(_reason(error).replace(str(hidden), str(options.place.folder)))
    finally:
        # What is complete stays, also where somebody interrupts.
        if any(hidden.iterdir()):
            done.written += _written(batch, stems, staging.publish(), options)
    if problem is not None:
        raise problem


def _endings(batch: DrawnBatch, index: int, options: GenerateOptions) -> list[str]:
    """What follows the stem of a picture in the names of its files; the picture itself comes first."""
    previews = [f"-scale-{scale:02}.png" for scale in range(len(batch.previews))]
    maps = [_MAP, *([_TRACE] if index == 0 else [])] if options.trace else []
    return [options.place.suffix, *previews, *maps]


def _stem(staging: Staging, batch: DrawnBatch, index: int, options: GenerateOptions) -> str:
    row = batch.rows[index]
    if options.place.file is not None:
        return Path(options.place.file).stem
    return staging.free_stem(f"{slug(row.prompt)}-{row.seed}", _endings(batch, index, options))


def _name(stem: str, options: GenerateOptions) -> str:
    """Of the picture; a file keeps the case of its ending."""
    return options.place.file or stem + options.place.suffix


def _write(
    staging: Staging, batch: DrawnBatch, index: int, stems: Sequence[str], encoder: Encoder, options: GenerateOptions
) -> None:
    """Writes a picture, and then what belongs to it; one trace holds the whole batch, beside its first picture."""
    stem, picture = stems[index], batch.images[index]
    config = batch.output.row_config(index, store_batch=options.store_batch)
    save_image(picture, staging.path(_name(stem, options)), config, encoder=encoder)
    for scale, pictures in enumerate(batch.previews):
        _save_plain(pictures[index], staging.path(f"{stem}-scale-{scale:02}.png"))
    if not options.trace:
        return
    if index == 0:
        write_text(staging.path(stem + _TRACE), batch.output.trace.dumps())
    from foveate.viz.maps import compute_map  # noqa: PLC0415 - plots are loaded only where one is drawn

    _save_plain(compute_map(picture, batch.output.trace, index), staging.path(stem + _MAP))


def _save_plain(image: Image.Image, path: Path) -> None:
    """A PNG without a configuration, complete or not at all."""
    with replace_file(path) as partial:
        image.save(partial, format="PNG")


def _written(
    batch: DrawnBatch, stems: Sequence[str], places: Mapping[str, Path], options: GenerateOptions
) -> Iterator[Written]:
    """The pictures of a batch that are in their place, with what belongs to them."""
    trace = places.get(stems[0] + _TRACE) if stems else None
    for index, (stem, row) in enumerate(zip(stems, batch.rows, strict=False)):
        if (picture := places.get(_name(stem, options))) is not None:
            names = [stem + ending for ending in _endings(batch, index, options)[1:]]
            yield Written(
                picture=picture,
                seed=row.seed,
                prompt=row.prompt,
                previews=tuple(places[n] for n in names if n in places and not n.endswith((_MAP, _TRACE))),
                map_=places.get(stem + _MAP),
                trace=trace,
            )


def _report(done: Done, as_json: bool) -> None:
    assert done.report is not None, "there is at least one batch"
    if as_json:
        print_json(_as_json(done, done.report))
        return
    print_facts(_facts(done.report, done.config, len(done.written)))
    traces = [files.trace for files in done.written if files.trace is not None]
    for files in done.written:
        print_paths([files.picture, *files.previews, *([files.map_] if files.map_ is not None else [])])
    print_paths(dict.fromkeys(traces))


def _as_json(done: Done, report: Report) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    for files in done.written:
        image: dict[str, Any] = {"path": str(files.picture), "seed": files.seed, "prompt": files.prompt}
        if files.previews:
            image["previews"] = [str(path) for path in files.previews]
        if files.map_ is not None:
            image["map"] = str(files.map_)
        if files.trace is not None:
            image["trace"] = str(files.trace)
        images.append(image)
    found = {"images": images, **report_json(report, done.config)}
    traces = list(dict.fromkeys(image["trace"] for image in images if "trace" in image))
    return {**found, "trace": traces[0]} if len(traces) == 1 else found


def report_json(report: Report, config: dict[str, Any]) -> dict[str, Any]:
    """Policy, time, what ran and what was warned of, as `generate --json` says them."""
    return {
        "policy": {key: config["policy"][key] for key in ("spec", "fingerprint")},
        "ms": {part: getattr(report.ms, part) for part in ("text", "transformer", "decoder", "total")},
        "flops": {"run": report.flops_run, "full": report.flops_full},
        "tokens": {"run": report.tokens_run, "full": report.tokens_full},
        "token_blocks": {"run": report.token_blocks_run, "full": report.token_blocks_full},
        "warnings": [warning.to_json() for warning in report.warnings],
    }


def _facts(report: Report, config: dict[str, Any], num_images: int) -> list[tuple[str, str]]:
    """The short table for people."""
    ms, policy = report.ms, config["policy"]

    def ran(run: int, full: int) -> str:
        return f"{run} of {full} ({run / full:.1%})"

    return [
        ("pictures", f"{num_images} of {config['width']}x{config['height']}, model {config['model']}"),
        ("policy", f"{policy['spec']} ({policy['fingerprint']})"),
        ("time", f"{ms.total:.0f} ms: text {ms.text:.0f}, transformer {ms.transformer:.0f}, decoder {ms.decoder:.0f}"),
        ("FLOPs", f"{in_units(report.flops_run)} of {in_units(report.flops_full)} ({report.flops_ratio:.1%})"),
        ("tokens", ran(report.tokens_run, report.tokens_full)),
        ("token-blocks", ran(report.token_blocks_run, report.token_blocks_full)),
        ("predicted speedup", f"{report.predicted_speedup:.2f}x of the transformer"),
        *(("note", note) for note in report.notes),
    ]
