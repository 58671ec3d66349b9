"""What a run will take, before it runs: time and disk from a sample, FLOPs and memory from shapes."""

import time
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from foveate.bulk.rows import BadRow, Row
from foveate.bulk.settings import RunSettings
from foveate.bulk.sources import Source
from foveate.bulk.tasks import job_of, kind_of, tasks_of, with_run
from foveate.core.errors import FoveateError
from foveate.pipeline.bulk import BulkSettings, batch_size_for, draw_batch, need_of
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import encoded_image

_SAMPLES = 8
"""Kinds of rows that are timed; the others are taken to cost what these do on average."""

_MOST_OF_A_SAMPLE, _SHOWN_ERRORS = 16, 5

_BESIDE_BYTES = 4096
"""Of an image in a shard: its line of the manifest and its prompt, each rounded up to blocks of 512 with a header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run will take.

    Attributes:
        rows: That are not done yet.
        bad_rows: Those of them that cannot be read, or that the model refuses, as far as a sample shows.
        images: Of the others.
        shards: That are not there yet.
        seconds: At the pace of the sample, in one process like this one.
        flops_run: Of all images.
        flops_full: Of the same without a policy.
        memory_bytes: Of the largest batch, weights included, as the memory model has it.
        disk_bytes: Of all shards.
        sampled_images: That were generated to find this.
        errors: Of the first rows that will fail.
    """

    rows: int
    bad_rows: int
    images: int
    shards: int
    seconds: float
    flops_run: float
    flops_full: float
    memory_bytes: int
    disk_bytes: float
    sampled_images: int
    errors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """What one image of a kind costs."""

    seconds: float
    flops_run: float
    flops_full: float
    disk_bytes: float
    memory_bytes: int
    num_images: int


@dataclass(kw_only=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        images: How many there are of each kind (`kind_of`).
        rows_of: How many rows are of each kind.
        first: The first rows of each kind, `_MOST_OF_A_SAMPLE` at most.
        rows: All that were read.
        bad: Those that cannot be read.
        errors: Of the first of them.
    """

    images: Counter[Hashable]
    rows_of: Counter[Hashable]
    first: dict[Hashable, list[Row]]
    rows: int = 0
    bad: int = 0
    errors: tuple[str, ...] = ()

    def refuse(self, num_rows: int, reason: str) -> None:
        """Counts rows that cannot run."""
        self.bad += num_rows
        if len(self.errors) < _SHOWN_ERRORS:
            self.errors = (*self.errors, reason)


def planned(settings: RunSettings, source: Source, shards: Iterable[int]) -> Plan:
    """Reads all rows of some shards; no model is needed, and what is held does not grow with their number.

    Kinds are counted, so that rows of which each asks for something else take memory, 200 bytes or so each.
    """
    plan, size = Plan(images=Counter(), rows_of=Counter(), first={}), settings.shard_size
    for number in shards:
        for row in source.read(number * size, (number + 1) * size):
            plan.rows += 1
            if isinstance(row, BadRow):
                plan.refuse(1, f"{row.where}: {row.reason}")
                continue
            try:
                full = with_run(row, settings.options)
            except FoveateError as error:
                plan.refuse(1, f"row {row.index}: {error}")
                continue
            kind = kind_of(full)
            plan.images[kind] += full.num_images or 1
            plan.rows_of[kind] += 1
            if len(first := plan.first.setdefault(kind, [])) < _MOST_OF_A_SAMPLE:
                first.append(full)
    return plan


def forecast(pipe: Pipeline, settings: RunSettings, source: Source, shards: Iterable[int]) -> Forecast:
    """Reads all rows, generates a batch of each kind (`_SAMPLES` at most), and extrapolates; nothing is written.

    Args:
        pipe: The model.
        settings: Of the run.
        source: The input.
        shards: Those that are to be made.

    Raises:
        FoveateError: No row can run; the error of the first one.
    """
    numbers = list(shards)
    plan = planned(settings, source, numbers)
    runnable = {kind: good for kind in plan.first if (good := _runnable(pipe, settings, plan, kind))}
    common = [kind for kind, _ in plan.images.most_common() if kind in runnable][:_SAMPLES]
    samples = {}
    for kind in common:
        try:
            samples[kind] = _sampled(pipe, settings, runnable[kind], plan.images[kind])
        except Exception as error:  # of whatever kind: the run goes on behind such rows, too
            plan.refuse(plan.rows_of[kind], f"row {runnable[kind][0].index}: {' '.join(str(error).split())}")
            del runnable[kind]
    if not samples and plan.errors:
        raise FoveateError(f"no row can run; the first error: {plan.errors[0]}")
    # What was not sampled costs what an average image of the sample does.
    images = sum(plan.images[kind] for kind in runnable)
    scale = images / max(1, sum(plan.images[kind] for kind in samples))

    def total(name: str) -> float:
        return scale * sum(getattr(samples[kind], name) * plan.images[kind] for kind in samples)

    return Forecast(
        rows=plan.rows,
        bad_rows=plan.bad,
        images=images,
        shards=len(numbers),
        seconds=total("seconds"),
        flops_run=total("flops_run"),
        flops_full=total("flops_full"),
        memory_bytes=max((sample.memory_bytes for sample in samples.values()), default=0),
        disk_bytes=total("disk_bytes"),
        sampled_images=sum(sample.num_images for sample in samples.values()),
        errors=plan.errors,
    )


def _runnable(pipe: Pipeline, settings: RunSettings, plan: Plan, kind: Hashable) -> list[Row]:
    """The first rows of a kind that the model takes; where it takes none, all of the kind count as bad."""
    good, reason = [], ""
    for row in plan.first[kind]:
        try:
            job_of(pipe, row, settings.seed)
            good.append(row)
        except FoveateError as error:
            reason = reason or f"row {row.index}: {error}"
    if not good:
        plan.refuse(plan.rows_of[kind], reason)
    elif reason:
        plan.refuse(len(plan.first[kind]) - len(good), reason)
    return good


def _sampled(pipe: Pipeline, settings: RunSettings, kind: list[Row], count: int) -> _Sample:
    """Generates one batch of a kind, the second time for the clock."""
    how, job = BulkSettings(batch_size=settings.batch_size), job_of(pipe, kind[0], settings.seed)
    tasks = [task for row in kind for task in tasks_of(row, job_of(pipe, row, settings.seed))]
    size = min(batch_size_for(pipe, job, how), _MOST_OF_A_SAMPLE, count)
    rows, options = [task.image_row for task in tasks[:size]], tasks[0].options
    draw_batch(pipe, rows[:1], how, options)
    began = time.perf_counter()
    drawn, _ = draw_batch(pipe, rows, how, options)
    if settings.psnr_to_full:
        draw_batch(pipe, rows, how, {**options, "policy": "full", "budget": None})
    contents = [
        encoded_image(image, drawn.output.row_config(index), settings.encoder)
        for index, image in enumerate(drawn.images)
    ]
    seconds, report, num = time.perf_counter() - began, drawn.output.report, len(drawn.images)
    need = need_of(pipe, job)
    return _Sample(
        seconds=seconds / num,
        flops_run=report.flops_run / num,
        flops_full=report.flops_full / num,
        disk_bytes=sum(map(len, contents)) / num + _BESIDE_BYTES,
        memory_bytes=need.phases["transformer"] + (num - 1) * need.drawing,
        num_images=num,
    )
