"""Files of images that were generated: each with what belongs to it, in its place as soon as its batch is done."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import repeat
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.cli.console import in_units, note, print_facts, print_json, print_paths
from foveate.cli.place import Place
from foveate.cli.staging import Staging, slug
from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError, is_out_of_memory
from foveate.engine.report import Report
from foveate.pipeline.bulk import LARGEST_BATCH, DrawnBatch, add_reports
from foveate.pipeline.encoding import JPEG_TEXT_BYTES, Encoder, fits_jpeg, prompt_bytes
from foveate.pipeline.options import Options
from foveate.pipeline.provenance import save_image

_MAP, _TRACE = "-map.png", "-trace.json"
"""Endings of what `--trace` writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The files of one image."""

    picture: Path
    seed: int
    prompt: str
    previews: tuple[Path, ...]
    map_: Path | None
    trace: Path | None


@dataclass(kw_only=True, slots=True)
class ImageFiles:
    """Where the images of a command go, what is written beside them, and what was generated and written so far.

    `stores_batch` keeps all prompts of its batch in every image; with `has_trace` a map and a trace are written.
    Reports of batches are added up as they come.
    """

    staging: Staging
    place: Place
    encoder: Encoder
    stores_batch: bool
    has_trace: bool
    written: list[Written] = field(default_factory=list)
    total: Report | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def saying_what_is_done(self, total: int) -> Iterator[None]:
        """Adds to any error how many images were written, as those stay.

        Raises:
            FoveateError: What came in one line. A mistake of this program is raised as it came.
        """
        try:
            yield
        except (FoveateError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, FoveateError | OSError) and not is_out_of_memory(error):
                raise
            if not self.written:
                raise
            raise FoveateError(f"{_reason(error)}; {self._count(total)}") from error
        except KeyboardInterrupt:
            if self.written:
                note(self._count(total))
            raise

    def write(self, batch: DrawnBatch) -> None:
        """Writes the images of a batch, also those behind one that cannot be written, and moves them to their place.

        Raises:
            FoveateError: A file could not be written; the first one that could not is named.
        """
        report = batch.output.report
        self.total = report if self.total is None else add_reports(self.total, report)
        self.config = batch.output.config
        stems: list[str] = []
        problem: FoveateError | None = None
        hidden = self.staging.path("x").parent
        try:
            for index in range(len(batch.rows)):
                stems.append(self._stem(batch, index))
                try:
                    self._write_one(batch, index, stems)
                except (FoveateError, OSError) as error:
                    problem = problem or FoveateError(_reason(error).replace(str(hidden), str(self.place.folder)))
        finally:
            # What is complete stays, also where somebody interrupts.
            if any(hidden.iterdir()):
                self.written += self._in_place(batch, stems, self.staging.publish())
        if problem is not None:
            raise problem

    def report(self, *, as_json: bool) -> None:
        """Prints what was generated and where it is."""
        assert self.total is not None, "there is at least one batch"
        if as_json:
            print_json(_as_json(self.written, self.total, self.config))
            return
        print_facts(_facts(self.total, self.config, len(self.written)))
        traces = [files.trace for files in self.written if files.trace is not None]
        for files in self.written:
            print_paths([files.picture, *files.previews, *([files.map_] if files.map_ is not None else [])])
        print_paths(dict.fromkeys(traces))

    def _count(self, total: int) -> str:
        return f"{len(self.written)} of {total} images are in {self.place.folder}"

    def _endings(self, batch: DrawnBatch, index: int) -> list[str]:
        """Endings of an image's files behind the stem; the image itself comes first."""
        previews = [f"-scale-{scale:02}.png" for scale in range(len(batch.previews))]
        maps = [_MAP, *([_TRACE] if index == 0 else [])] if self.has_trace else []
        return [self.place.suffix, *previews, *maps]

    def _stem(self, batch: DrawnBatch, index: int) -> str:
        row = batch.rows[index]
        if self.place.file is not None:
            return Path(self.place.file).stem
        return self.staging.free_stem(f"{slug(row.prompt)}-{row.seed}", self._endings(batch, index))

    def _name(self, stem: str) -> str:
        """Of the image; a file keeps the case of its ending."""
        return self.place.file or stem + self.place.suffix

    def _write_one(self, batch: DrawnBatch, index: int, stems: Sequence[str]) -> None:
        """Writes an image, and then what belongs to it; one trace holds the whole batch, beside its first image."""
        stem, picture = stems[index], batch.images[index]
        config = batch.output.row_config(index, store_batch=self.stores_batch)
        save_image(picture, self.staging.path(self._name(stem)), config, encoder=self.encoder)
        for scale, pictures in enumerate(batch.previews):
            _save_plain(pictures[index], self.staging.path(f"{stem}-scale-{scale:02}.png"))
        if not self.has_trace:
            return
        if index == 0:
            write_text(self.staging.path(stem + _TRACE), batch.output.trace.dumps())
        from foveate.viz.maps import compute_map  # noqa: PLC0415 - plots are loaded only where one is drawn

        _save_plain(compute_map(picture, batch.output.trace, index), self.staging.path(stem + _MAP))

    def _in_place(self, batch: DrawnBatch, stems: Sequence[str], places: Mapping[str, Path]) -> Iterator[Written]:
        """The images of a batch that are in their place, with what belongs to them."""
        trace = places.get(stems[0] + _TRACE) if stems else None
        for index, (stem, row) in enumerate(zip(stems, batch.rows, strict=False)):
            if (picture := places.get(self._name(stem))) is not None:
                names = [stem + ending for ending in self._endings(batch, index)[1:]]
                yield Written(
                    picture=picture,
                    seed=row.seed,
                    prompt=row.prompt,
                    previews=tuple(places[n] for n in names if n in places and not n.endswith((_MAP, _TRACE))),
                    map_=places.get(stem + _MAP),
                    trace=trace,
                )


def refuse_long_prompts(prompts: Sequence[str], call: Options, encoder: Encoder, stored: int | None) -> None:
    """Finds before anything is generated that prompts do not fit into a JPEG, which holds little beside its pixels.

    Args:
        prompts: All of them.
        call: Negative prompt, and images per prompt.
        encoder: How the files are encoded.
        stored: Images of a batch whose prompts every file keeps beside its own; None for the largest batch.

    Raises:
        FoveateError: They do not fit.
    """
    if encoder.format != "jpeg":
        return
    held = 1 + (LARGEST_BATCH if stored is None else stored)
    repeats, negative = min(int(call["num_images_per_prompt"]), held), call["negative_prompt"]
    lengths = (length for prompt in prompts for length in repeat(prompt_bytes(prompt, negative), repeats))
    if not fits_jpeg(nlargest(held, lengths)):
        raise FoveateError(
            f"the prompts are too long to be stored in a jpeg, which holds {JPEG_TEXT_BYTES} bytes; write png or webp"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, FoveateError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    first = (str(error).splitlines() or ["the allocation failed"])[0][:200]
    return f"not enough memory ({first}); try a smaller --batch-size"


def _save_plain(image: Image.Image, path: Path) -> None:
    """Saves a PNG without a configuration, atomically."""
    with replace_file(path) as partial:
        image.save(partial, format="PNG")


def _as_json(written: Sequence[Written], report: Report, config: dict[str, Any]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    for files in written:
        image: dict[str, Any] = {"path": str(files.picture), "seed": files.seed, "prompt": files.prompt}
        if files.previews:
            image["previews"] = [str(path) for path in files.previews]
        if files.map_ is not None:
            image["map"] = str(files.map_)
        if files.trace is not None:
            image["trace"] = str(files.trace)
        images.append(image)
    found = {"images": images, **report_json(report, config)}
    traces = list(dict.fromkeys(image["trace"] for image in images if "trace" in image))
    return {**found, "trace": traces[0]} if len(traces) == 1 else found


def report_json(report: Report, config: dict[str, Any]) -> dict[str, Any]:
    """Policy, time, what ran and what was warned of, as `generate --json` says them."""
    return {
        "policy": {key: config["policy"][key] for key in ("spec", "fingerprint")},
        "ms": {part: getattr(report.ms, part) for part in ("text", "transformer", "refiner", "decoder", "total")},
        "flops": {"run": report.flops_run, "full": report.flops_full, "refiner_run": report.refiner_flops_run},
        "tokens": {"run": report.tokens_run, "full": report.tokens_full},
        "token_blocks": {"run": report.token_blocks_run, "full": report.token_blocks_full},
        "warnings": [warning.to_json() for warning in report.warnings],
        **({} if report.late_ms is None else {"latency": _latency(report, report.late_ms)}),
    }


def _latency(report: Report, late_ms: float) -> dict[str, Any]:
    """Whether the budget of a call was met, and by how much it was missed."""
    return {"budget_ms": report.latency_budget_ms, "late_ms": late_ms, "is_met": late_ms <= 0}


def _in_time(report: Report) -> list[tuple[str, str]]:
    if report.late_ms is None:
        return []
    verdict = f"missed by {report.late_ms:.0f} ms" if report.late_ms > 0 else f"met, {-report.late_ms:.0f} ms to spare"
    return [("latency budget", f"{report.latency_budget_ms:g} ms, {verdict}")]


def _facts(report: Report, config: dict[str, Any], num_images: int) -> list[tuple[str, str]]:
    """The short table for people."""
    ms, policy = report.ms, config["policy"]
    names = ("text", "transformer", *(("refiner",) if ms.refiner else ()), "decoder")
    parts = [f"{name} {getattr(ms, name):.0f}" for name in names]

    def ran(run: int, full: int) -> str:
        return f"{run} of {full} ({run / full:.1%})"

    return [
        ("images", f"{num_images} of {config['width']}x{config['height']}, model {config['model']}"),
        ("policy", f"{policy['spec']} ({policy['fingerprint']})"),
        ("time", f"{ms.total:.0f} ms: {', '.join(parts)}"),
        *_in_time(report),
        ("FLOPs", f"{in_units(report.flops_run)} of {in_units(report.flops_full)} ({report.flops_ratio:.1%})"),
        ("tokens", ran(report.tokens_run, report.tokens_full)),
        ("token-blocks", ran(report.token_blocks_run, report.token_blocks_full)),
        ("predicted speedup", f"{report.predicted_speedup:.2f}x of the {' and '.join(names[1:-1])}"),
        *(("note", note) for note in report.notes),
    ]
