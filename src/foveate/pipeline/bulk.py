"""Many images: rows in, batches that fit into memory, images out as they are done.

Rows come from an iterator and are never listed; a batch is one call of the pipeline. On a CPU with keyed draws an image
has the same bits alone and in any batch, so the size of batches decides time and memory and no pixel. Draws in the
published order (`rng="reference"`) belong to a whole batch, so those rows are one batch or none.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Unpack

from PIL import Image
from tqdm import tqdm

from foveate.core.errors import BrokenNumbersError, FoveateError
from foveate.engine.report import Milliseconds, Report
from foveate.families.available import available_bytes
from foveate.families.memory import MemoryNeed, largest_batch, memory_need, resident_bytes
from foveate.families.residency import Residency
from foveate.families.spec import ModelSpec
from foveate.pipeline.call import MAX_SEED, Job, Prompts, resolve
from foveate.pipeline.deadline import any_level
from foveate.pipeline.options import CallOptions, Options, checked
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline

LARGEST_BATCH = 16
"""Images of a batch where nobody says how many: eight already have most of the gain (docs/speed.md)."""

ALL_SCALES = 1000
"""More previews than any schedule has scales."""

_SHARE = 0.9
"""Of the memory that is available, what is planned with: the model of what images take is right within a tenth."""

_UNKNOWN = 4096
"""Images of the largest batch where the system does not say how much memory is left."""

_RESIDENT = Residency()
_OF_ROWS = ("seed", "num_images_per_prompt", "negative_prompt", "generator")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image that is asked for."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkSettings:
    """How rows are generated.

    Attributes:
        batch_size: Images at once; None takes what fits into memory, `LARGEST_BATCH` at most.
        total: How many rows will come, for the progress bar and for early refusals; None if nobody knows.
        previews: How many of the last scales come with decoded images, the final one included.
        residency: How the pipeline holds its weights.
        hides_progress: As `Pipeline.set_progress_bar_config` takes it.
    """

    batch_size: int | None = None
    total: int | None = None
    previews: int = 0
    residency: Residency = _RESIDENT
    hides_progress: bool | None = None

    def __post_init__(self) -> None:
        """Refuses an empty batch."""
        if self.batch_size is not None and self.batch_size < 1:
            raise FoveateError(f"a batch must have 1 image or more, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnBatch:
    """A batch that is done.

    Attributes:
        rows: What was asked for.
        images: One per row.
        previews: Per scale before the last that was decoded, one image per row.
        output: Of the call that generated it; its lists are in the order of `rows`.
    """

    rows: tuple[ImageRow, ...]
    images: list[Image.Image]
    previews: tuple[list[Image.Image], ...]
    output: PipelineOutput[list[Image.Image]]


def rows_of(prompts: Prompts, spec: ModelSpec, **options: Unpack[Options]) -> Iterator[ImageRow]:
    """The rows of a call: `num_images_per_prompt` of every prompt, none of them made before it is asked for.

    Raises:
        FoveateError: What a call with these options would refuse.
    """
    call = checked(options)
    if call["generator"] is not None:
        raise FoveateError("rows have seeds of their own; leave generator out")
    num = int(call["num_images_per_prompt"])
    job = resolve(prompts, {**options, "num_images_per_prompt": 1}, spec)
    for start in job.seeds:
        if start > MAX_SEED - num:
            raise FoveateError(f"{num} images from seed {start} on need seeds of 2^63 and more; ask for fewer images")
    # Draws in the published order have one seed for all.
    step = 0 if call["rng"] == "reference" else 1
    negatives = job.negatives or (None,) * len(job.prompts)
    return (
        ImageRow(prompt=prompt, seed=seed + step * j, negative_prompt=negative)
        for prompt, seed, negative in zip(job.prompts, job.seeds, negatives, strict=True)
        for j in range(num)
    )


def draw_rows(
    pipe: Pipeline, rows: Iterable[ImageRow], how: BulkSettings, **options: Unpack[CallOptions]
) -> Generator[DrawnBatch, None, None]:
    """Generates rows batch by batch; a batch is generated when it is asked for. Closing the iterator cancels.

    Args:
        pipe: Generates the images.
        rows: What is generated; read as far as the next batch needs.
        how: Batches, previews and progress.
        **options: Of all rows; see `foveate.pipeline.options.Options`. What rows say themselves is not among them.

    Raises:
        FoveateError: A value out of range, a batch or an image that does not fit into memory. Said before anything is
            generated.
    """
    for name in _OF_ROWS:
        if name in options:
            raise FoveateError(f"rows say {name} themselves; leave it out")
    if "output_type" in options:
        raise FoveateError("rows come as PIL images; leave output_type out")
    source = iter(rows)
    first = next(source, None)
    if first is None:
        raise FoveateError("there are no rows to generate; give one or more")
    source = chain((first,), source)
    own: Options = {
        **options,
        "seed": first.seed,
        "negative_prompt": first.negative_prompt,
        "output_type": "pil",
    }
    job = pipe.job(first.prompt, own)
    if job.options["rng"] == "reference":
        batches: Iterator[tuple[ImageRow, ...]] = iter((_one_batch(pipe, job, source, how),))
    else:
        batches = _batches(source, batch_size_for(pipe, job, how))
    return _draw(pipe, batches, how, options)


def refuse_too_many(pipe: Pipeline, job: Job, num_images: int, residency: Residency = _RESIDENT) -> None:
    """Refuses a batch that does not fit into what memory is left.

    Raises:
        FoveateError: It names the largest batch that fits.
    """
    need, largest = _largest(pipe, job, residency)
    if num_images <= largest:
        return
    height, width = (side * pipe.model.spec.stride for side in job.schedule.grids[-1])
    taken = need.drawing if largest else max(need.drawing, need.decoder)
    beside = f"an image of {width}x{height} takes {_in_megabytes(taken)} beside the weights"
    if largest == 0:
        raise FoveateError(
            f"not even one image fits into the memory that is available: {beside}; choose a smaller size or model, "
            "or bfloat16"
        )
    if job.options["rng"] == "reference":
        raise FoveateError(
            f'rng="reference" generates all images as one batch, and {num_images} do not fit into memory ({beside}); '
            f'the largest batch that fits is {largest}, so ask for fewer images, or take rng="keyed"'
        )
    raise FoveateError(
        f"a batch of {num_images} images does not fit into memory ({beside}); the largest batch that fits is {largest}"
    )


def add_reports(first: Report, second: Report) -> Report:
    """Cost of two batches together: sums of times and counts, maxima of memory; each warning once."""
    a, b = first.ms, second.ms
    names = (
        "flops_run", "flops_full", "refiner_flops_run", "tokens_run", "tokens_full", "token_blocks_run",
        "token_blocks_full",
    )  # fmt: skip
    peaks = ("kv_bytes_peak", "kv_bytes_bound", "cache_bytes_peak")
    both = first.warnings + second.warnings
    # A directive that had an effect in one batch is not reported as without effect.
    shared = set(first.warnings) & set(second.warnings)
    return replace(
        first,
        **{name: getattr(first, name) + getattr(second, name) for name in names},
        **{name: max(getattr(first, name), getattr(second, name)) for name in peaks},
        flops_full_by_image=first.flops_full_by_image + second.flops_full_by_image,
        latency_budget_ms=_sum(first.latency_budget_ms, second.latency_budget_ms),
        ms=Milliseconds(
            text=a.text + b.text,
            transformer=a.transformer + b.transformer,
            refiner=a.refiner + b.refiner,
            decoder=a.decoder + b.decoder,
            total=a.total + b.total,
        ),
        unfired=tuple(name for name in first.unfired if name in second.unfired),
        notes=tuple(dict.fromkeys(first.notes + second.notes)),
        warnings=tuple(
            dict.fromkeys(found for found in both if found.code != "policy_without_effect" or found in shared)
        ),
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def need_of(pipe: Pipeline, job: Job, residency: Residency = _RESIDENT) -> MemoryNeed:
    """Bytes of one image of a call."""
    model, precision = pipe.model, pipe.model.precision
    is_timed = "latency_budget_ms" in job.asked
    return memory_need(
        model.spec,
        precision.dtype,
        any_level(job.policy, job.schedule, model.transformer.shape) if is_timed else job.policy,
        schedule=job.schedule,
        residency=residency,
        quantization=precision.quantization,
        is_guided=job.guidance.is_needed(0),
    )


def _largest(pipe: Pipeline, job: Job, residency: Residency) -> tuple[MemoryNeed, int]:
    """Bytes of one image, and how many fit at once; `_UNKNOWN` if free memory is unknown."""
    need, model, precision = need_of(pipe, job, residency), pipe.model, pipe.model.precision
    available = available_bytes(model.device)
    if available is None:
        return need, _UNKNOWN
    resident = resident_bytes(model.spec, precision.dtype, precision.quantization, residency)
    return need, largest_batch(need, resident, int(_SHARE * available))


def batch_size_for(pipe: Pipeline, job: Job, how: BulkSettings) -> int:
    """Rows of a batch: as asked for, or as many as fit up to where more gain nothing.

    Raises:
        FoveateError: What was asked for does not fit into memory, or not even one image does.
    """
    if how.batch_size is not None:
        refuse_too_many(pipe, job, how.batch_size, how.residency)
        return how.batch_size
    refuse_too_many(pipe, job, 1, how.residency)
    _, largest = _largest(pipe, job, how.residency)
    return min(LARGEST_BATCH, largest)


def _one_batch(pipe: Pipeline, job: Job, rows: Iterator[ImageRow], how: BulkSettings) -> tuple[ImageRow, ...]:
    """All rows as one batch if they fit; read only as far as memory goes."""
    if how.total is not None:
        refuse_too_many(pipe, job, how.total, how.residency)
    _, largest = _largest(pipe, job, how.residency)
    found = tuple(islice(rows, largest + 1))
    refuse_too_many(pipe, job, len(found), how.residency)
    if how.batch_size is not None and how.batch_size < len(found):
        raise FoveateError(f'rng="reference" generates all {len(found)} images as one batch; leave the batch size out')
    if len({(row.seed, row.negative_prompt is None) for row in found}) > 1:
        raise FoveateError('rng="reference" takes one seed for all rows, and negative prompts for all or none')
    return found


def _batches(rows: Iterator[ImageRow], size: int) -> Iterator[tuple[ImageRow, ...]]:
    """Batches of consecutive rows, `size` at most, either all or none with a negative prompt."""
    batch: list[ImageRow] = []
    for row in rows:
        if batch and (row.negative_prompt is None) != (batch[0].negative_prompt is None):
            yield tuple(batch)
            batch = []
        batch.append(row)
        if len(batch) == size:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)


def _draw(
    pipe: Pipeline, batches: Iterator[tuple[ImageRow, ...]], how: BulkSettings, options: CallOptions
) -> Generator[DrawnBatch, None, None]:
    """Generates the batches; with several, a bar counts images and says how long the rest will take."""
    once, bar, num_drawn = _Once(), None, 0
    try:
        for rows in batches:
            if bar is None:
                is_alone = how.total is not None and how.total <= len(rows)
                bar = tqdm(total=how.total, disable=is_alone or how.hides_progress, unit="image", leave=False)
            with once.listening():
                batch, broken = draw_batch(pipe, rows, how, options, num_drawn)
            bar.update(len(batch.rows))
            yield batch
            if broken is not None:
                raise broken
            num_drawn += len(rows)
    finally:
        if bar is not None:
            bar.close()


def draw_batch(
    pipe: Pipeline, rows: Sequence[ImageRow], how: BulkSettings, options: CallOptions, first: int = 0
) -> tuple[DrawnBatch, BrokenNumbersError | None]:
    """Generates a batch without the images whose numbers break, and returns the error that names those.

    Args:
        pipe: Generates the images.
        rows: The batch; all of them or none have a negative prompt.
        how: Previews.
        options: Of all rows.
        first: Its first row among all rows, as the error counts.

    Raises:
        BrokenNumbersError: No image is left, or the others would not be the same without the broken ones.
    """
    left, broken = list(range(len(rows))), None
    while True:
        try:
            return _draw_batch(pipe, [rows[i] for i in left], how, options), broken
        except BrokenNumbersError as error:
            fallen = [left[i] for i in error.images]
            named = [first + i for i in fallen] + list(broken.images if broken is not None else ())
            broken = BrokenNumbersError(error.reason, sorted(named))
            left = [i for i in left if i not in fallen]
            if not fallen or not left or options.get("rng") == "reference":
                raise broken from None


def _draw_batch(pipe: Pipeline, rows: Sequence[ImageRow], how: BulkSettings, options: CallOptions) -> DrawnBatch:
    negatives = [row.negative_prompt for row in rows if row.negative_prompt is not None]
    call: CallOptions = {
        **options,
        "seed": rows[0].seed if options.get("rng") == "reference" else [row.seed for row in rows],
        "negative_prompt": negatives or None,
    }
    previews: list[list[Image.Image]] = []
    with closing(pipe.stream([row.prompt for row in rows], previews=how.previews, **call)) as events:
        for event in events:
            if event.output is not None:
                output = event.output
                return DrawnBatch(rows=tuple(rows), images=output.images, previews=tuple(previews), output=output)
            if event.images is not None:
                previews.append(event.images)
    raise AssertionError("the last event of a stream carries the output")


def _in_megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


class _Once(logging.Filter):
    """Lets a warning through once, however many batches give it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Filters what is logged inside."""
        logger = logging.getLogger("foveate")
        logger.addFilter(self)
        try:
            yield
        finally:
            logger.removeFilter(self)
