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

from foveate.bulk.output import Item, OutputFolder, Shard
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

_MOST_SUSPECTS = 20
"""Images that may fail one after the other for a reason that is no rule of ours, before the machine is blamed."""

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

    def __add__(self, other: "Progress") -> "Progress":
        """Both together, with the first error."""
        return Progress(
            **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS}, error=self.error or other.error
        )


_COUNTS = ("images", "failures", "resumed", "flops_run", "flops_full", "more")

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

    def generate(self, number: int) -> Progress:
        """Generates what the journals of a shard lack, and publishes it.

        Only images go to the journal: failures are written when the shard is published, so that a run that is started
        again tries them once more until then.

        Returns:
            What was done, without what an earlier process did.

        Raises:
            FoveateError: The shard cannot be written, the input changed, or so many images fail one after the other
                that the machine or the model is at fault. A row that fails raises nothing.
        """
        size, batch = self.settings.shard_size, self.settings.batch_size or 1
        with self.output.shard(number) as shard, _Filler(shard, self.settings, self.listener) as filler:
            filler.say(Progress(resumed=sum(shard.done.has_image(key) for key in shard.done)))
            rows = iter(self.source.read(number * size, (number + 1) * size))
            while window := list(islice(rows, max(WINDOW, 4 * batch))):
                self._draw_window(window, filler)
            return filler.publish()

    def _draw_window(self, rows: Sequence[Row | BadRow], filler: "_Filler") -> None:
        """Generates what is not done of some rows; what can share batches does."""
        tasks = [task for row in rows for task in self._tasks(row, filler)]
        filler.say(Progress(more=len(tasks) - len(rows) * self.settings.images_per_row))
        for group in groups_of(filler.left(tasks)):
            self._draw_group(group, filler)

    def _tasks(self, row: Row | BadRow, filler: "_Filler") -> list[Task]:
        """The images of a row; none of one that cannot be read or that the model refuses, which has failed."""
        if isinstance(row, BadRow):
            reason = f"{row.where}: {row.reason}"
        else:
            try:
                full = with_run(row, self.settings.options)
                return list(tasks_of(full, job_of(self.pipe, full, self.settings.seed)))
            except FoveateError as error:
                reason = str(error)
        filler.fail(row, None, reason, attempts=1)
        return []

    def _draw_group(self, tasks: Sequence[Task], filler: "_Filler") -> None:
        """Generates images that can share batches; those that fail in company are tried again alone."""
        try:
            size = len(tasks) if tasks[0].is_reference else self._batch_size(tasks[0])
        except FoveateError as error:
            for task in tasks:
                filler.fail(task.row, task.image, str(error), attempts=1)
            return
        waiting, attempts = deque(_split(tasks, size)), Counter[tuple[int, int]]()
        while waiting:
            batch = waiting.popleft()
            try:
                drawn = self._draw(batch)
            except Exception as error:  # of whatever kind, it ends no other row
                if len(batch) > 1 and not batch[0].is_reference:
                    # Half of it where memory ran out; else each alone, as one of them is to blame.
                    waiting.extendleft(reversed(_split(batch, len(batch) // 2 if is_out_of_memory(error) else 1)))
                    continue
                failed = [(task, _reason(error)) for task in batch]
                filler.suspect(None if isinstance(error, FoveateError) else _reason(error))
            else:
                failed = drawn.failed
                filler.put(drawn)
            again = self._tried_again(failed, attempts, filler)
            waiting.extend(_split(again, size if tasks[0].is_reference else 1))

    def _tried_again(
        self, failed: Sequence[tuple[Task, str]], attempts: Counter[tuple[int, int]], filler: "_Filler"
    ) -> list[Task]:
        """Those that have attempts left; the others have failed."""
        again = []
        for task, reason in failed:
            attempts[task.key] += 1
            if attempts[task.key] > self.settings.retries:
                filler.fail(task.row, task.image, reason, attempts=attempts[task.key])
            else:
                again.append(task)
        return again

    def _batch_size(self, task: Task) -> int:
        """Images of a batch: as asked for, or where so many do not fit as many as do."""
        job = job_of(self.pipe, task.row, self.settings.seed)
        try:
            return batch_size_for(self.pipe, job, BulkSettings(batch_size=self.settings.batch_size))
        except FoveateError:
            return batch_size_for(self.pipe, job, BulkSettings())

    def _draw(self, batch: Sequence[Task]) -> "_Drawn":
        """Generates a batch."""
        rows, options, how = [task.image_row for task in batch], batch[0].options, BulkSettings()
        drawn, broken = draw_batch(self.pipe, rows, how, options)
        fallen = set() if broken is None else set(broken.images)
        kept = [task for index, task in enumerate(batch) if index not in fallen]
        found: list[float | None] = [None] * len(kept)
        if self.settings.psnr_to_full:
            full, missing = draw_batch(self.pipe, drawn.rows, how, {**options, "policy": "full", "budget": None})
            there = [i for i in range(len(kept)) if missing is None or i not in missing.images]
            images = [drawn.images[i] for i in there]
            for i, value in zip(there, psnr(_stacked(images), _stacked(full.images)), strict=True):
                found[i] = float(value)
        failed = [(batch[index], str(broken)) for index in sorted(fallen)]
        return _Drawn(tasks=kept, batch=drawn, psnrs=found, failed=failed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """A batch that is done: its images with their PSNR to the full run, and what is missing with reasons."""

    tasks: Sequence[Task]
    batch: DrawnBatch
    psnrs: Sequence[float | None]
    failed: list[tuple[Task, str]]


class _Filler:
    """Fills a shard: encodes and appends beside the model, and keeps failures until the end.

    An error of the journal is raised at the next call, and never belongs to a row.
    """

    def __init__(self, shard: Shard, settings: RunSettings, listener: Listener) -> None:
        self._shard, self._settings, self._listener = shard, settings, listener
        self._encoders = ThreadPoolExecutor(min(_MOST_ENCODERS, os.cpu_count() or 1), "foveate-encode")
        self._appender = ThreadPoolExecutor(1, "foveate-append")
        self._waiting: deque[Future[Progress]] = deque()
        self._failures: list[Item] = []
        self._due: set[tuple[int, int | None]] = set()
        self._suspects = 0
        self._total = Progress()

    def __enter__(self) -> "_Filler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._appender.shutdown(cancel_futures=kind is not None)
        self._encoders.shutdown(cancel_futures=kind is not None)

    def say(self, progress: Progress) -> None:
        """Tells the listener, and adds it up."""
        self._total += progress
        self._listener(progress)

    def left(self, tasks: Sequence[Task]) -> list[Task]:
        """What has no image yet. Where draws belong to a whole call, all images of a row of which one is missing."""
        self._due |= {task.key for task in tasks}
        missing = {task.key for task in tasks if not self._shard.done.has_image(task.key)}
        rows = {row for row, _ in missing}
        return [task for task in tasks if task.key in missing or (task.is_reference and task.row.index in rows)]

    def put(self, drawn: _Drawn) -> None:
        """Writes a batch; waits where too many are unwritten."""
        self._suspects = 0
        report, output = drawn.batch.output.report, drawn.batch.output
        flops = list(zip(output.trace.flops_by_image, report.flops_full_by_image, strict=True))
        items = [
            self._encoders.submit(_item, task, drawn, index, flops[index], self._settings)
            for index, task in enumerate(drawn.tasks)
        ]
        progress = Progress(flops_run=report.flops_run, flops_full=report.flops_full)
        self._waiting.append(self._appender.submit(self._append, drawn.tasks, items, progress))
        while self._waiting and (len(self._waiting) > _WAITING or self._waiting[0].done()):
            self.say(self._waiting.popleft().result())

    def fail(self, row: Row | BadRow, image: int | None, reason: str, *, attempts: int) -> None:
        """Keeps that an image failed, or with None the whole row."""
        self._due.add((row.index, image))
        self._failures.append(_failure(row, image, reason, attempts))
        self.say(Progress(failures=1, more=int(image is None), error=f"row {row.index}: {reason}"))

    def suspect(self, reason: str | None) -> None:
        """Counts images that failed one after the other for a reason that is none of ours.

        Raises:
            FoveateError: So many did that it is not the rows.
        """
        self._suspects = 0 if reason is None else self._suspects + 1
        if self._suspects >= _MOST_SUSPECTS:
            raise FoveateError(
                f"{_MOST_SUSPECTS} images in a row failed, the last one with {reason}; mend the machine or the model, "
                "and start the same command again: what is done stays, and nothing of this shard counts as failed"
            )

    def publish(self) -> Progress:
        """Waits until all is in the journal, and makes the shard visible."""
        while self._waiting:
            self.say(self._waiting.popleft().result())
        if self._failures:
            self._shard.append(self._failures)
        lost = [key for key in self._due if key not in self._shard.done and key[1] is not None]
        assert not lost, f"nothing is known of {lost[:5]}"
        self._shard.publish()
        return self._total

    def _append(self, tasks: Sequence[Task], items: Sequence[Future[Item]], progress: Progress) -> Progress:
        """Writes what could be encoded; an image that could not has failed alone."""
        found: list[Item] = []
        for task, item in zip(tasks, items, strict=True):
            try:
                found.append(item.result())
            except Exception as error:  # a text that does not fit into a JPEG
                self._failures.append(_failure(task.row, task.image, _reason(error), attempts=1))
                progress += Progress(failures=1, error=f"row {task.row.index}: {_reason(error)}")
        if found:
            self._shard.append(found)
        return progress + Progress(images=len(found))


def _failure(row: Row | BadRow, image: int | None, reason: str, attempts: int) -> Item:
    entry: dict[str, Any] = {"row": row.index, "id": row.id, "image": image}
    if isinstance(row, Row):
        entry["prompt"] = row.prompt
    return Item(entry={**entry, "error": reason, "attempts": attempts}, content=None)


def _item(task: Task, drawn: _Drawn, index: int, flops: tuple[int, int], settings: RunSettings) -> Item:
    """An image as it is stored, and its line of the manifest."""
    config, picture = drawn.batch.output.row_config(index), drawn.batch.images[index]
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
            "psnr_to_full": drawn.psnrs[index],
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
