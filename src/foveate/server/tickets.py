"""Requests and their images while a scheduler holds them."""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from foveate.core.warnings import CallWarning
from foveate.pipeline.budget import with_policy
from foveate.pipeline.call import Job
from foveate.pipeline.options import Options
from foveate.pipeline.runner import BatchStep, Encoded, OpenCall
from foveate.policies.skip_scales import SkipScales
from foveate.server.forecasts import Forecast
from foveate.server.work import Event, Failed, Finished, Listener, Work

logger = logging.getLogger("foveate")

_ID_BYTES = 16
_PATIENCE_S = 5.0
"""How far behind its start an image without a deadline is as urgent as one whose deadline is then."""


class RequestTicket:
    """A request of n images; its listener hears nothing behind `Failed` or `Finished`."""

    def __init__(
        self, work: Work, listener: Listener, place: Callable[["RequestTicket"], int], flops: float = 0.0
    ) -> None:
        self.id = secrets.token_urlsafe(_ID_BYTES)
        self.work, self.accepted, self.flops = work, time.perf_counter(), flops
        self.deadline = None if work.budget_ms is None else self.accepted + work.budget_ms / 1e3
        self.encoded: Encoded | None = None
        self.num_left = work.job.num_images
        self.has_started = self.is_over = False
        self._listener, self._place = listener, place
        self._cancelled = threading.Event()

    @property
    def position(self) -> int:
        """Requests that begin before this one; 0 once its first image has started."""
        return 0 if self.has_started or self.is_over else self._place(self)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked to stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Asks to stop; the scheduler does at the next scale."""
        self._cancelled.set()

    def say(self, event: Event) -> None:
        """Sends an event; a listener that raises has its request cancelled, and nobody else hears of it."""
        if self.is_over:
            return
        self.is_over = isinstance(event, Failed | Finished)
        try:
            self._listener(event)
        except Exception:
            logger.exception("the listener of request %s failed; the request is cancelled", self.id)
            self.cancel()


@dataclass(kw_only=True, eq=False, slots=True)
class Task:
    """One image of a request.

    `sent` is the latest scale that was said: an image that is generated again after an error of the loop says only what
    is new. `partial_at` are the scales whose images were asked for as partial images.
    """

    ticket: RequestTicket
    index: int
    job: Job
    forecast: Forecast
    need_bytes: int
    partial_at: tuple[int, ...]
    call: OpenCall | None = None
    step: BatchStep | None = None
    attempts: int = 0
    sent: int = -1
    order: int = 0
    admitted: float = 0.0
    has_started: bool = False

    @property
    def next_flops(self) -> float:
        """FLOPs of the scale that runs next."""
        assert self.call is not None, "it was opened"
        return self.forecast.flops[self.call.next_scale]

    @property
    def urgency(self) -> tuple[float, int]:
        """Earlier deadlines first, then older images; one without a deadline has its own, so that none starves."""
        own = self.admitted + _PATIENCE_S
        return (own if self.ticket.deadline is None else min(own, self.ticket.deadline), self.order)

    @property
    def is_suspect(self) -> bool:
        """Whether an error escaped the loop while it ran: it then runs by itself, to tell whose error it was."""
        return self.attempts > 1


def job_of(job: Job, index: int, *, wants_maps: bool) -> Job:
    """The call of one image of a call of one prompt, with the seed that it has there."""
    seed = job.seeds[index]
    options: Options = {**job.options, "num_images_per_prompt": 1, "seed": seed, "trace": wants_maps}
    return replace(job, options=options, seeds=(seed,))


def ended_at(call: OpenCall, scale: int) -> OpenCall:
    """The call as if it had been asked to end behind a scale, so that its image can be made again; with a warning."""
    job, left = call.job, len(call.job.schedule) - 1 - scale
    message = f"the image ends {left} scales before its last one, as its time was up"
    warning = CallWarning(code="deadline_cut", message=message)
    taken = job.policy if call.deadline is None else call.deadline.taken()
    return replace(
        call,
        job=with_policy(job, taken | SkipScales(count=left)),
        deadline=None,
        encoded=replace(call.encoded, warnings=(*call.encoded.warnings, warning)),
    )
