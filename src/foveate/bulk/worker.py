"""Generates the images of one output shard at a time: what one process of a run does, whichever engine starts it."""

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from foveate.bulk.output import Item, OutputFolder, Shard, Summary
from foveate.bulk.rows import BadRow, Row
from foveate.bulk.settings import RunSettings
from foveate.bulk.sources import Source
from foveate.bulk.tasks import Task, groups_of, job_of, tasks_of, with_run
from foveate.core.errors import FoveateError, is_out_of_memory
from foveate.eval.fidelity import psnr
from foveate.pipeline.bulk import BulkSettings, DrawnBatch, batch_size_for, draw_batch
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import encoded_image

_WAITING = 2
"""Batches that are generated and not yet written, at most: a slow disk holds the model back."""

_MOST_ENCODERS = 8

WINDOW = 256
"""Rows that are read ahead, so that those alike share batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What came since the last time: images written, images that failed, and FLOPs of those that ran.

    `resumed` counts what an earlier process did of a shard. `more` corrects how many images the run has, as what rows
    ask for is known when their shard is read.
    """

    images: int = 0
    failures: int = 0
    resumed: int = 0
    flops_run: int = 0
    flops_full: int = 0
    more: int = 0
    error: str | None = None


Listener = Callable[[Progress], None]


@dataclass(kw_only=True, slots=True)
class Worker:
    """A loaded model that fills shards.

    Attributes:
        pipe: The model.
        settings: Of the run.
        source: Rows.
        output: Where shards go.
        listener: Told of every batch.
    """

    pipe: Pipeline
    settings: RunSettings
    source: Source
    output: OutputFolder
    listener: Listener = field(default=lambda _: None)

    def generate(self, number: int) -> Summary:
        """Generates what the journals of a shard lack, and publishes it.

        Raises:
            FoveateError: The shard cannot be written, or the input changed. A row that fails raises nothing.
        """
        size = self.settings.shard_size
        with self.output.shard(number) as shard, _Writer(shard, self.listener) as writer:
            self.listener(Progress(resumed=len(shard.done)))
            source = iter(self.source.read(number * size, (number + 1) * size))
            while window := list(islice(source, WINDOW)):
                self._draw_window(window, shard, writer)
            writer.finish()
            return shard.publish()

    def _draw_window(self, rows: Sequence[Row | BadRow], shard: Shard, writer: "_Writer") -> None:
        """Generates what is not done of some rows; what can share batches does."""
        tasks = [task for row in rows for task in self._tasks(row, shard, writer)]
        self.listener(Progress(more=len(tasks) - len(rows) * self.settings.images_per_row))
        for group in groups_of(task for task in tasks if task.key not in shard.done):
            self._draw_group(group, writer)

    def _tasks(self, row: Row | BadRow, shard: Shard, writer: "_Writer") -> list[Task]:
        """The images of a row; none of one that cannot be read or that the model refuses, which has failed."""
        if isinstance(row, BadRow):
            reason = f"{row.where}: {row.reason}"
        else:
            try:
                full = with_run(row, self.settings.options)
                return list(tasks_of(full, job_of(self.pipe, full, self.settings.seed)))
            except FoveateError as error:
                reason = str(error)
        if (row.index, None) not in shard.done:
            writer.fail(row, None, reason, attempts=1)
        return []

    def _draw_group(self, tasks: Sequence[Task], writer: "_Writer") -> None:
        """Generates images that can share batches; those that fail in company are tried again alone."""
        pipe, how = self.pipe, BulkSettings(batch_size=self.settings.batch_size)
        is_reference = tasks[0].options.get("rng") == "reference"
        try:
            size = len(tasks) if is_reference else batch_size_for(pipe, job_of(pipe, tasks[0].row, 0), how)
        except FoveateError as error:
            for task in tasks:
                writer.fail(task.row, task.image, str(error), attempts=1)
            return
        waiting, attempts = deque(_split(tasks, size)), Counter[tuple[int, int]]()
        while waiting:
            batch = waiting.popleft()
            try:
                failed = self._draw(batch, how, writer)
            except Exception as error:
                if len(batch) > 1 and not is_reference:
                    # Half of it where memory ran out; else each alone, as one of them is to blame.
                    waiting.extendleft(reversed(_split(batch, len(batch) // 2 if is_out_of_memory(error) else 1)))
                    continue
                failed = [(task, _reason(error)) for task in batch]
            again = []
            for task, reason in failed:
                attempts[task.key] += 1
                if attempts[task.key] > self.settings.retries:
                    writer.fail(task.row, task.image, reason, attempts=attempts[task.key])
                else:
                    again.append(task)
            waiting.extend(_split(again, size if is_reference else 1))

    def _draw(self, batch: Sequence[Task], how: BulkSettings, writer: "_Writer") -> list[tuple[Task, str]]:
        """Generates a batch and hands it to the writer; the images whose numbers broke come back."""
        rows, options = [task.image_row for task in batch], batch[0].options
        drawn, broken = draw_batch(self.pipe, rows, how, options)
        fallen = set() if broken is None else set(broken.images)
        kept = [task for index, task in enumerate(batch) if index not in fallen]
        found: list[float | None] = [None] * len(kept)
        if self.settings.psnr_to_full:
            full, _ = draw_batch(self.pipe, drawn.rows, how, {**options, "policy": "full", "budget": None})
            found = [*map(float, psnr(_stacked(drawn.images), _stacked(full.images)))]
        writer.put(kept, drawn, found, self.settings)
        return [(batch[index], str(broken)) for index in sorted(fallen)]


class _Writer:
    """Encodes images and appends them to the journal, beside the model; an error of it is raised at the next call."""

    def __init__(self, shard: Shard, listener: Listener) -> None:
        self._shard, self._listener = shard, listener
        self._encoders = ThreadPoolExecutor(min(_MOST_ENCODERS, os.cpu_count() or 1), "foveate-encode")
        self._appender = ThreadPoolExecutor(1, "foveate-append")
        self._waiting: deque[Future[Progress]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._appender.shutdown(cancel_futures=kind is not None)
        self._encoders.shutdown(cancel_futures=kind is not None)

    def put(
        self, tasks: Sequence[Task], drawn: DrawnBatch, psnrs: Sequence[float | None], settings: RunSettings
    ) -> None:
        """Writes a batch; waits where too many are unwritten."""
        report, output = drawn.output.report, drawn.output
        flops = list(zip(output.trace.flops_by_image, report.flops_full_by_image, strict=True))
        items = [
            self._encoders.submit(_item, task, drawn, index, flops[index], psnrs[index], settings)
            for index, task in enumerate(tasks)
        ]
        progress = Progress(images=len(tasks), flops_run=report.flops_run, flops_full=report.flops_full)
        self._submit(items, progress)

    def fail(self, row: Row | BadRow, image: int | None, reason: str, *, attempts: int) -> None:
        """Writes that an image failed, or with None the whole row."""
        entry: dict[str, Any] = {"row": row.index, "id": row.id, "image": image}
        if isinstance(row, Row):
            entry["prompt"] = row.prompt
        done: Future[Item] = Future()
        done.set_result(Item(entry={**entry, "error": reason, "attempts": attempts}, content=None))
        self._submit([done], Progress(failures=1, more=image is None, error=f"row {row.index}: {reason}"))

    def finish(self) -> None:
        """Waits until all is in the journal."""
        while self._waiting:
            self._listener(self._waiting.popleft().result())

    def _submit(self, items: Sequence[Future[Item]], progress: Progress) -> None:
        self._waiting.append(self._appender.submit(self._append, items, progress))
        while self._waiting and (len(self._waiting) > _WAITING or self._waiting[0].done()):
            self._listener(self._waiting.popleft().result())

    def _append(self, items: Sequence[Future[Item]], progress: Progress) -> Progress:
        self._shard.append([item.result() for item in items])
        return progress


def _item(
    task: Task,
    drawn: DrawnBatch,
    index: int,
    flops: tuple[int, int],
    psnr_to_full: float | None,
    settings: RunSettings,
) -> Item:
    """An image as it is stored, and its line of the manifest."""
    config, picture = drawn.output.row_config(index), drawn.images[index]
    content = encoded_image(picture, config, settings.encoder)
    return Item(
        entry={
            "row": task.row.index,
            "id": task.row.id,
            "image": task.image,
            "prompt": task.row.prompt,
            "negative_prompt": task.negative_prompt,
            "seed": task.seed,
            "policy": config["policy"]["spec"],
            "policy_fingerprint": config["policy"]["fingerprint"],
            "model": config["model"],
            "weights_sha256": config["weights"]["sha256"],
            "width": picture.width,
            "height": picture.height,
            "format": settings.encoder.format,
            "flops_run": flops[0],
            "flops_full": flops[1],
            "psnr_to_full": psnr_to_full,
            "warnings": config.get("warnings", []),
            "extra": dict(task.row.extra),
        },
        content=content,
    )


def _split(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    return [tasks[first : first + size] for first in range(0, len(tasks), max(size, 1))]


def _stacked(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def _reason(error: Exception) -> str:
    """One line; the kind of an error that is not ours."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, FoveateError) else f"{type(error).__name__}: {text[:500]}"
