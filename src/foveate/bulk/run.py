"""A whole run: the shards that are not there yet, in this process one after the other, or in workers on Ray."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from foveate.bulk.output import OutputFolder
from foveate.bulk.ray_engine import RayWorkers, generate_on_ray
from foveate.bulk.settings import RunSettings
from foveate.bulk.sources import Source
from foveate.bulk.worker import Listener, Progress, Worker
from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.said_once import warnings_once

REMEMBERED_PROMPTS = 512
"""Prompts whose conditions are kept: those of a worker's window with their negative prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which shards a job makes: every `count`-th, from the `index`-th on, counted from 1.

    Raises:
        FoveateError: Another index than 1 to `count`.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        """Refuses a part that there is not."""
        if not 1 <= self.index <= self.count:
            raise FoveateError(
                f"--shard is k/n with k from 1 to n, got {self.index}/{self.count}; a job array that counts from 0 "
                "adds 1"
            )

    @classmethod
    def parsed(cls, text: str) -> "Part":
        """Reads `k/n`.

        Raises:
            FoveateError: It is something else.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.strip().isdecimal() or not count.strip().isdecimal():
            raise FoveateError(f"--shard must be k/n, such as 1/8 for the first of eight jobs, got {text!r}")
        return cls(index=int(index), count=int(count))

    @property
    def lock(self) -> str:
        """The name under which one process at a time works on it."""
        return f"job-{self.index}-of-{self.count}"

    def shards(self, num_shards: int) -> range:
        """The numbers of its shards."""
        return range(self.index - 1, num_shards, self.count)


@dataclass(kw_only=True, slots=True)
class Tally:
    """What a run has done, in this process.

    `images` and `failures` count those of this process alone, `errors` are the first few. `failed_before` counts the
    failures that the folder had.
    """

    images: int = 0
    failures: int = 0
    flops_run: int = 0
    flops_full: int = 0
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    failed_before: int = 0

    @property
    def images_per_s(self) -> float:
        """Images a second, loading left out."""
        return self.images / self.seconds if self.seconds else 0.0

    def add(self, progress: Progress) -> None:
        """Counts what came."""
        self.images += progress.images
        self.failures += progress.failures
        self.flops_run += progress.flops_run
        self.flops_full += progress.flops_full
        if progress.error is not None and len(self.errors) < _SHOWN_ERRORS:
            self.errors = (*self.errors, progress.error)

    def to_json(self) -> dict[str, Any]:
        """As `--json` says it."""
        return {
            "images": self.images,
            "failures": self.failures,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "flops": {"run": self.flops_run, "full": self.flops_full},
            "errors": list(self.errors),
        }


_SHOWN_ERRORS = 5


class Bar:
    """The progress of a run on stderr: images, images a second, time left, what the policy saves, and failures."""

    def __init__(self, total: int, *, is_hidden: bool | None, failed_before: int = 0) -> None:
        self._total = total
        self._bar = tqdm(total=total, disable=is_hidden, unit="image", smoothing=0.05, dynamic_ncols=True)
        self.tally = Tally(failed_before=failed_before)
        self._began = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Takes what a worker says."""
        tally = self.tally
        tally.add(progress)
        tally.seconds = time.monotonic() - self._began
        self._bar.total = self._total = self._total + progress.more
        if progress.resumed:
            # Not made now, so that it does not count for the pace.
            self._bar.n += progress.resumed
            if not self._bar.disable:
                self._bar.initial += progress.resumed
                self._bar.last_print_n += progress.resumed
        self._bar.update(progress.images + progress.failures)
        words = []
        if tally.flops_full and tally.flops_run != tally.flops_full:
            words.append(f"{1 - tally.flops_run / tally.flops_full:.0%} of FLOPs saved")
        if tally.failures:
            words.append(f"{tally.failures} failed")
        self._bar.set_postfix_str(", ".join(words), refresh=False)

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is to be done.

    Attributes:
        settings: Of the images.
        source: Rows.
        output: Where shards go.
        shards: Numbers of the shards that are not there yet.
        bar: Shows progress.
    """

    settings: RunSettings
    source: Source
    output: OutputFolder
    shards: Sequence[int]
    bar: Bar


def run_local(pipe: Pipeline, run: Run, *, max_failures: int | None = None) -> Tally:
    """Generates shards one after the other in this process.

    Args:
        pipe: The model.
        run: What is to be done.
        max_failures: How many images may fail; None for any number.

    Raises:
        FoveateError: The output cannot be written, or more images failed than may; what is done stays.
    """

    def listen(progress: Progress) -> None:
        run.bar(progress)
        refuse_failures(run.bar.tally, max_failures)

    worker = worker_of(pipe, run.settings, run.source, run.output, listen)
    with warnings_once(by_code=True):
        for number in run.shards:
            worker.generate(number)
    return run.bar.tally


def worker_of(
    pipe: Pipeline, settings: RunSettings, source: Source, output: OutputFolder, listener: Listener = lambda _: None
) -> Worker:
    """A worker with a pipeline that remembers prompts and shows no progress of its own."""
    pipe.set_progress_bar_config(disable=True)
    pipe.remember_prompts(REMEMBERED_PROMPTS)
    return Worker(pipe=pipe, settings=settings, source=source, output=output, listener=listener)


def loaded_worker(settings: RunSettings, source: Source, output: OutputFolder) -> Worker:
    """A worker in another process, which loads the model for itself."""
    return worker_of(settings.loading.open(), settings, source, output)


def run_on_ray(run: Run, workers: RayWorkers, *, max_failures: int | None = None) -> Tally:
    """Generates shards in workers of a Ray cluster, which see the input and the output as this process does.

    Args:
        run: What is to be done; progress comes shard by shard.
        workers: How many there are, and where.
        max_failures: How many images may fail; None for any number.

    Raises:
        FoveateError: Ray or a worker cannot be had, a shard cannot be made, or more images failed than may; what is
            done stays.
    """
    make = partial(loaded_worker, run.settings, run.source, run.output)
    for _, made in generate_on_ray(make, run.shards, workers):
        run.bar(made)
        refuse_failures(run.bar.tally, max_failures)
    return run.bar.tally


def refuse_failures(tally: Tally, max_failures: int | None) -> None:
    """Ends a run with too many failures.

    Raises:
        FoveateError: It says the first error.
    """
    failed = tally.failures + tally.failed_before
    if max_failures is not None and failed > max_failures:
        first = f"; the first of now: {tally.errors[0]}" if tally.errors else "; see failed.jsonl"
        raise FoveateError(
            f"{failed} images failed, more than --max-failures {max_failures}{first}. What is done stays: allow "
            "more, or mend it and try those again with --retry-failed"
        )
