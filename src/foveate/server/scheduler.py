"""Packs the images of many requests, scale by scale, in a thread of its own; usable without HTTP.

In every turn the small scales of all images run as one batch; where none is small, as many as take together no longer
than the largest scale of one image. A new request so waits for one scale of one image at most. Whatever an image shares
a batch with, it has the bits that it has alone (docs/speed.md says where).
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image

from foveate.core.errors import Cancelled, FoveateError
from foveate.families.offload import CODEBOOK, TRANSFORMER
from foveate.kernels.heap import kept_heap
from foveate.pipeline.call import Job
from foveate.pipeline.output import PipelineOutput, tokens_run
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.profile import load_profile
from foveate.pipeline.runner import BatchStep
from foveate.server.fair_queue import FairQueue
from foveate.server.forecasts import Forecast, forecast_of, profiled
from foveate.server.rates import Rates
from foveate.server.room import Room
from foveate.server.tickets import RequestTicket, Task, ended_at, job_of
from foveate.server.work import (
    ClosingError,
    Failed,
    Finished,
    ImageDone,
    LateError,
    Listener,
    QueueFullError,
    ScaleDone,
    Started,
    Stats,
    Work,
)

logger = logging.getLogger("foveate")

_ATTEMPTS = 3
"""How often an image is begun before an error that escapes the loop is its answer."""
_LATEST_IMAGES = 32
"""Images that the rate looks back on."""
_LATEST_FINISHES = 8
"""Decodings whose longest is expected of the next one."""
_PAUSE_S = 0.05
"""Behind an error that escaped the loop, so that one that comes every turn does not fill the log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    """How much a scheduler takes on.

    Attributes:
        max_images: Images at once, those of all requests.
        max_queue: Images that may wait.
        memory_share: Of the memory that is available at the start, what images may take, in (0, 1].
    """

    max_images: int = 8
    max_queue: int = 64
    memory_share: float = 0.8

    def __post_init__(self) -> None:
        """Refuses what could never serve a request."""
        for name in ("max_images", "max_queue"):
            if getattr(self, name) < 1:
                raise FoveateError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.memory_share <= 1:
            raise FoveateError(f"memory_share must be in (0, 1], got {self.memory_share:g}")


class Scheduler:
    """Runs requests on a pipeline; `start` begins, `close` ends. Nobody else may use the pipeline meanwhile."""

    def __init__(self, pipe: Pipeline, settings: SchedulerSettings | None = None) -> None:
        self.pipe, self.settings = pipe, settings or SchedulerSettings()
        self.rates = Rates()
        self._lock = threading.Condition()
        self._queue: FairQueue[Task] = FairQueue()
        self._running: list[Task] = []
        self._orders, self._restarts = count(), 0
        self._busy_s, self._done_at = 0.0, deque[float](maxlen=_LATEST_IMAGES)
        self._is_closing = self._is_stopped = self._has_dropped = False
        self._company_now: list[Task] = []
        self._finish_s = deque[float](maxlen=_LATEST_FINISHES)
        self._room = Room(pipe=pipe)
        self._thread = threading.Thread(target=self._loop, name="foveate-scheduler", daemon=True)

    def start(self) -> None:
        """Starts the thread; sizes memory by what is free now, and rates by a profile where there is one."""
        with kept_heap():
            job = self.pipe.job(self._any_prompt(), {})
        self._room = Room.of(self.pipe, job, self.settings.memory_share)
        try:
            self.rates.fit(profiled(load_profile(self.pipe.model), job, self.pipe.model.transformer.shape))
        except FoveateError:
            logger.debug("no profile of this machine; the warm-up measures what packing gains")
        self._thread.start()

    def warm_up(self) -> float:
        """Generates one image of the default size and waits for it; seconds that it took.

        Raises:
            Exception: What the image failed with.
        """
        done, found = threading.Event(), list[Exception]()
        began = time.perf_counter()

        def hear(event: object) -> None:
            if isinstance(event, Failed):
                found.append(event.error)
            if isinstance(event, Failed | Finished):
                done.set()

        self.submit(Work(job=self.pipe.job(self._any_prompt(), {"seed": 0}), key="warm-up", partials=1), hear)
        done.wait()
        if found:
            raise found[0]
        return time.perf_counter() - began

    def submit(self, work: Work, listener: Listener) -> RequestTicket:
        """Accepts a request; its events come to the listener, from the scheduler's thread.

        Raises:
            QueueFullError: Too many images wait.
            ClosingError: The server stops.
            FoveateError: It asks for what cannot be packed, or would never fit into the memory.
        """
        job = work.job
        forecast, need = self._forecast(job), self._room.need(job)
        ticket = RequestTicket(work, listener, self._place, job.num_images * sum(forecast.flops))
        partial_at = forecast.partial_scales(work.partials)
        with self._lock:
            if self._is_closing:
                raise ClosingError("the server is stopping and takes no more requests; try again later")
            waiting = len(self._queue) + job.num_images - self.settings.max_queue
            if waiting > 0:
                raise self._full(waiting, job.num_images)
            for index in range(job.num_images):
                task = Task(
                    ticket=ticket,
                    index=index,
                    job=job_of(job, index, wants_maps=work.wants_maps),
                    forecast=forecast,
                    need_bytes=need,
                    partial_at=partial_at,
                )
                self._queue.push(work.key, task, sum(forecast.flops))
            self._lock.notify_all()
        return ticket

    def stats(self) -> Stats:
        """What is held now; safe from any thread, never waits for a scale."""
        with self._lock:
            queued = list(self._queue.order())
            return Stats(
                queued_requests=len({id(task.ticket) for task in queued if not task.ticket.has_started}),
                queued_images=len(queued),
                running_images=len(self._running),
                max_images=self.settings.max_images,
                reserved_bytes=self._room.reserved,
                budget_bytes=self._room.budget,
                images_per_s=self._images_per_s(),
                restarts=self._restarts,
                is_closing=self._is_closing,
            )

    def close(self, grace_s: float) -> bool:
        """Takes no more, and waits until everything accepted is answered, at most `grace_s` seconds.

        What is not done by then fails with `ClosingError`, at the end of the scale that runs. True if all was done.
        """
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
        self._thread.join(grace_s)
        with self._lock:
            self._is_stopped = True
            self._lock.notify_all()
        self._thread.join()
        return not self._has_dropped

    # What follows runs in the scheduler's thread, but for what only reads under the lock.

    def _loop(self) -> None:
        try:
            self._serve()
        except Exception:
            logger.exception("the scheduler ended; requests are refused until the server is started again")
        finally:
            with self._lock:
                self._is_closing = self._is_stopped = True
            self._drop(ClosingError("the server stopped before the request was done; try again later"))

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not (self._running or len(self._queue) or self._is_closing):
                    self._lock.wait()
                if self._is_stopped or (self._is_closing and not self._running and not len(self._queue)):
                    return
            with kept_heap():
                self._busy_turns()

    def _busy_turns(self) -> None:
        """Turns until nothing is left or somebody stops it."""
        while not self._is_stopped and (self._running or len(self._queue)):
            began = time.perf_counter()
            try:
                self._turn()
            except Exception as error:  # a fault of ours must not end the service
                self._recover(error)
            self._busy_s += time.perf_counter() - began

    def _turn(self) -> None:
        self._company_now = []
        self._drop_gone()
        self._admit()
        company = self._company_now = self._company()
        if not company:
            return
        calls = [task.call for task in company if task.call is not None]
        outcomes = self.pipe.runner.advance(calls, decodes=True)
        for task, outcome in zip(company, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(task.ticket, outcome)
            elif not task.ticket.is_over:
                self._step(task, outcome, len(company))

    def _drop_gone(self) -> None:
        """Ends the requests that were cancelled, and those whose time was up before their first image."""
        now = time.perf_counter()
        with self._lock:
            waiting = list(self._queue.order())
        for ticket in dict.fromkeys(task.ticket for task in (*self._running, *waiting)):
            if ticket.is_cancelled:
                self._fail(ticket, Cancelled("the request was cancelled"))
            elif ticket.deadline is not None and now > ticket.deadline and not ticket.has_started:
                self._fail(ticket, LateError("the request waited longer than its latency_budget_ms; allow more time"))

    def _admit(self) -> None:
        """Opens images while there is room, in the order of the queue."""
        while len(self._running) < self.settings.max_images:
            with self._lock:
                task = self._queue.peek()
                if task is None or not self._room.holds(task.need_bytes):
                    return
                self._queue.pop()
                task.order, task.attempts = next(self._orders), task.attempts + 1
                task.admitted = time.perf_counter()
                self._running.append(task)
                self._room.reserved += task.need_bytes
            self._open(task)

    def _open(self, task: Task) -> None:
        ticket, runner = task.ticket, self.pipe.runner
        try:
            ticket.encoded = ticket.encoded or runner.encode(task.job)
            task.call = runner.open(task.job, ticket.accepted, encoded=ticket.encoded, times_scales=True)
        except Exception as error:  # whatever its policy or the device raises is the answer of the request
            self._fail(ticket, error)
            return
        if not task.has_started:
            ticket.has_started = task.has_started = True
            ticket.say(Started(index=task.index, waited_ms=1e3 * (time.perf_counter() - ticket.accepted)))

    def _company(self) -> list[Task]:
        """What runs next: all images whose next scale is small, else as many as take no longer than one large scale."""
        opened = sorted((task for task in self._running if task.call is not None), key=lambda task: task.urgency)
        if opened and opened[0].is_suspect:
            return opened[:1]
        opened = [task for task in opened if not task.is_suspect]
        small = [task for task in opened if self.rates.is_small(task.next_flops)]
        if small or not opened:
            return small
        most = self.rates.ms(max(max(task.forecast.flops) for task in opened))
        sums = accumulate(task.next_flops for task in opened)
        return [task for task, flops in zip(opened, sums, strict=True) if self.rates.ms(flops) <= most] or opened[:1]

    def _step(self, task: Task, step: BatchStep, company: int) -> None:
        """Says what a scale left; finishes the image behind its last one, or where its time is up."""
        task.step, ticket = step, task.ticket
        work, is_last = step.trace.scales[-1], step.scale == len(task.job.schedule) - 1
        if company == 1 and step.scale:
            # The first scale has the text's keys and values in its time.
            self.rates.note(task.forecast.flops[step.scale], work.ms)
        is_late = not is_last and self._is_late(task)
        try:
            if step.scale > task.sent:
                task.sent = step.scale
                ticket.say(self._said(task, step, company))
            if is_last or (is_late and ticket.work.on_late == "coarse"):
                self._finish(task, step, is_coarse=is_late)
            elif is_late:
                raise LateError(f"scale {step.scale + 1} of {len(task.job.schedule)} was done when its time was up")
        except Exception as error:  # broken pixels, or a decoder out of memory
            self._fail(ticket, error)

    def _is_late(self, task: Task) -> bool:
        """Whether the image would be decoded behind the deadline of its request if another scale ran."""
        deadline, forecast = task.ticket.deadline, task.forecast
        if deadline is None or task.call is None:
            return False
        needs_s = self.rates.ms(forecast.flops[task.call.next_scale]) / 1e3 + max(self._finish_s, default=0.0)
        return time.perf_counter() + needs_s > deadline

    def _said(self, task: Task, step: BatchStep, company: int) -> ScaleDone:
        work, scale, asked = step.trace.scales[-1], step.scale, task.ticket.work
        is_last = scale == len(task.job.schedule) - 1
        partial = task.partial_at.index(scale) if scale in task.partial_at else None
        wants_image = not is_last and (asked.every_scale or partial is not None)
        depth_hw = None
        if asked.wants_maps:
            depth_hw = np.zeros(work.grid, dtype=np.uint8)
            if work.depth_Bl is not None:
                depth_hw = work.depth_Bl[0].view(*work.grid).cpu().numpy().astype(np.uint8)
        return ScaleDone(
            index=task.index,
            scale=scale,
            num_scales=len(task.job.schedule),
            grid=work.grid,
            ms=work.ms,
            company=company,
            tokens_run=tokens_run(work),
            tokens_full=work.grid[0] * work.grid[1],
            flops=task.forecast.flops[scale],
            flops_full=task.forecast.flops_full[scale],
            image=self._coarse(task, step) if wants_image else None,
            partial=partial,
            depth_hw=depth_hw,
        )

    def _coarse(self, task: Task, step: BatchStep) -> Image.Image:
        """The latent so far, decoded on the scale's own grid and enlarged: a fraction of a full decode."""
        height, width = (side * self.pipe.model.spec.stride for side in task.job.schedule.grids[-1])
        # A decoder cannot take the mean of a single position.
        rows, columns = (max(side, 2) for side in task.job.schedule.latent_grid(step.scale))
        small_BZhw = F.interpolate(step.f_hat_BZHW, size=(rows, columns), mode="area")
        images = self.pipe.runner.decode(small_BZhw, "pil", (TRANSFORMER, CODEBOOK))
        assert isinstance(images, list), "pil was asked for"
        return images[0].resize((width, height), Image.Resampling.BICUBIC)

    def _finish(self, task: Task, step: BatchStep, *, is_coarse: bool) -> None:
        call, ticket = task.call, task.ticket
        assert call is not None, "it ran"
        self.pipe.runner.close(call)
        if is_coarse:
            call = ended_at(call, step.scale)
        began = time.perf_counter()
        output: PipelineOutput[Any] = self.pipe.finish(call, step)
        self._finish_s.append(time.perf_counter() - began)
        if ticket.work.on_late == "error" and ticket.deadline is not None and time.perf_counter() > ticket.deadline:
            raise LateError("the image was done behind its latency_budget_ms; allow more time")
        self._forget([task])
        ticket.num_left -= 1
        self._done_at.append(self._busy_s)
        ticket.say(ImageDone(index=task.index, output=output, scales=step.scale + 1, is_coarse=is_coarse))
        self.rates.fit()
        if not ticket.num_left:
            ticket.say(Finished(total_ms=1e3 * (time.perf_counter() - ticket.accepted)))

    def _fail(self, ticket: RequestTicket, error: Exception) -> None:
        """Ends a request: all its images go, running or not."""
        with self._lock:
            self._queue.remove(lambda task: task.ticket is ticket)
        self._forget([task for task in self._running if task.ticket is ticket])
        _release_frames(error)
        ticket.say(Failed(error=error))

    def _forget(self, tasks: Sequence[Task]) -> None:
        """Frees what images hold."""
        for task in tasks:
            call, task.call, task.step = task.call, None, None
            if call is not None:
                self.pipe.runner.close(call)
        with self._lock:
            for task in tasks:
                self._running.remove(task)
                self._room.reserved -= task.need_bytes

    def _recover(self, error: Exception) -> None:
        """Begins the images of a batch again, from their seeds; one that was begun too often gets the error.

        They run by themselves then, so that an error that comes again is that of its own image.
        """
        logger.error("an error escaped the scheduler's loop; its images are generated again", exc_info=error)
        self._restarts += 1
        time.sleep(_PAUSE_S)
        tasks = [task for task in self._company_now or self._running if task in self._running]
        _release_frames(error)
        self._forget(tasks)
        for task in sorted(tasks, key=lambda task: -task.order):
            if task.attempts >= _ATTEMPTS:
                self._fail(task.ticket, error)
            elif not task.ticket.is_over:
                with self._lock:
                    self._queue.push(task.ticket.work.key, task, 0.0, in_front=True)
        if not tasks:
            # Nothing ran, so nothing would change.
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Ends everything that is left."""
        with self._lock:
            waiting = list(self._queue.order())
        for ticket in dict.fromkeys(task.ticket for task in (*self._running, *waiting)):
            self._has_dropped = True
            self._fail(ticket, error)

    def _place(self, ticket: RequestTicket) -> int:
        """Requests that begin before this one, at least 1: it has not begun."""
        with self._lock:
            ahead: dict[int, None] = {}
            for task in self._queue.order():
                if task.ticket is ticket:
                    return len(ahead) + 1
                if not task.ticket.has_started:
                    ahead[id(task.ticket)] = None
            # It left the queue, and its prompt is being encoded.
            return 1

    def _images_per_s(self) -> float | None:
        times = list(self._done_at)
        if len(times) < 2 or times[-1] <= times[0]:  # noqa: PLR2004 - a rate needs two images
            return None
        return (len(times) - 1) / (times[-1] - times[0])

    def _full(self, over: int, num_images: int) -> FoveateError:
        """Why a request is not taken: for ever if it has more images than may wait, else until some have left."""
        most = self.settings.max_queue
        if num_images > most:
            return FoveateError(f"a request may have {most} images, got {num_images}; ask for fewer")
        rate = self._images_per_s()
        retry_s = max(1.0, over / rate) if rate else 1.0
        return QueueFullError(f"the queue is full, {most} images wait; try again in {retry_s:.0f} s", retry_s)

    def _any_prompt(self) -> str:
        return "0" if self.pipe.model.spec.conditioning.names_classes else "an image"

    def _forecast(self, job: Job) -> Forecast:
        shape = self.pipe.model.transformer.shape
        return forecast_of(job.policy, job.schedule, job.guidance, shape, job.negatives is not None)


def _release_frames(error: BaseException | None) -> None:
    """Frees what the frames of an error hold, tensors among it; where it was raised stays known."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
