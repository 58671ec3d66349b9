"""An accepted request on the event loop: its events in order, and what becomes of it when its client goes away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from foveate.server.admission import Asked
from foveate.server.errors import ApiError, api_error
from foveate.server.replies import Made, file_of
from foveate.server.reproduce import Origin
from foveate.server.schemas import Run, ScaleInfo
from foveate.server.service import Service
from foveate.server.work import ClosingError, Event, Failed, Finished, ImageDone, Listener, ScaleDone, Started, Ticket

logger = logging.getLogger("foveate.server")

_TICK_S = 0.25
"""How often a stream looks at its place in the queue."""

_MOST_WAITING_BYTES = 64 << 20
"""Pixels of the scales of a traced stream that wait for their client; those beyond are told without their images."""


@dataclass(kw_only=True, slots=True, eq=False)
class Side:
    """What has happened of one ticket so far; a comparison has two, everything else one."""

    asked: Asked
    ticket: Ticket | None = None
    waited_ms: dict[int, float] = field(default_factory=dict)
    scales: dict[int, list[ScaleInfo]] = field(default_factory=dict)
    done: dict[int, ImageDone] = field(default_factory=dict)
    is_over: bool = False

    @property
    def position(self) -> int:
        """Requests that begin before this one."""
        assert self.ticket is not None, "it was submitted"
        return self.ticket.position

    def take(self, event: Event) -> None:
        """Remembers what answers say of an image."""
        match event:
            case Started():
                self.waited_ms[event.index] = event.waited_ms
            case ScaleDone():
                tokens = Run(run=event.tokens_run, full=event.tokens_full)
                info = ScaleInfo(scale=event.scale, grid=event.grid, ms=event.ms, tokens=tokens)
                self.scales.setdefault(event.index, []).append(info)
            case ImageDone():
                self.done[event.index] = event
            case Failed() | Finished():
                self.is_over = True

    def made(self, event: ImageDone, origin: Origin) -> Made:
        """A finished image with all that is said of it; not yet encoded."""
        waited, scales = self.waited_ms.get(event.index, 0.0), self.scales.get(event.index, [])
        return Made.of(self.asked, event, waited, scales, origin)


class Exchange:
    """The tickets of one request; used on the event loop, but for `submit`.

    Attributes:
        sides: One per ticket.
        error: What the answer is; None while nothing failed.
        is_answered: Whether the client has been sent everything.
    """

    def __init__(self, service: Service, asked: Sequence[Asked], request_id: str, owner: str) -> None:
        """Nothing is submitted yet; made on the event loop."""
        self.sides = tuple(Side(asked=one) for one in asked)
        self.error: ApiError | None = None
        self.is_answered = False
        self._service, self._id, self._owner = service, request_id, owner
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Side, Event]] = asyncio.Queue()
        self._has_left, self._waiting_bytes = False, 0
        service.begins(self._end)

    @property
    def id(self) -> str:
        """Of the request."""
        return self._id

    @property
    def flops(self) -> float:
        """Of the transformer, that were forecast for what was submitted."""
        return sum(side.ticket.flops for side in self.sides if side.ticket is not None)

    def submit(self, headers: Mapping[str, str]) -> None:
        """Submits all sides, or none; called in a thread.

        Raises:
            FoveateError: As `Scheduling.submit`.
        """
        _, scheduler = self._service.opened()
        service = self._service
        try:
            for side in self.sides:
                work, user = side.asked.work, side.asked.body.user or side.asked.body.safety_identifier
                inner = service.spans.watch(self._id, work, self._listener(side), headers)
                listener = service.metrics.watch(work, service.log.watch(self._id, work, inner))
                side.ticket = scheduler.submit(work, listener)
                service.log.accepted(self._id, work, position=side.ticket.position, user=user)
        except BaseException:
            self._cancel()
            raise
        if self._has_left:
            self._cancel()

    async def events(self, *, ticks: bool = False) -> AsyncIterator[tuple[Side, Event | None]]:
        """Events of all sides until all are over; with `ticks` also None, a few times a second.

        Raises:
            ApiError: A side failed; the others are cancelled.
        """
        while not all(side.is_over for side in self.sides):
            try:
                side, event = await asyncio.wait_for(self._next(), _TICK_S if ticks else None)
            except TimeoutError:
                for side in self.sides:
                    yield side, None
                continue
            side.take(event)
            if isinstance(event, Failed):
                self._cancel()
                raise api_error(event.error)
            yield side, event

    async def check(self) -> None:
        """Asks the operator's check about all finished images.

        Raises:
            ApiError: It refused one.
        """
        for side in self.sides:
            for index in sorted(side.done):
                await self._service.check(side.asked.body.prompt, side.done[index].output.images[0])

    def leave(self) -> None:
        """The client has its answer or went away; what it did not get is cancelled, or finished into the store.

        What was answered with an error is not kept: it may have been refused.
        """
        if self._has_left:
            return
        self._has_left = True
        self._service.ends(self._end)
        if self.is_answered:
            return
        has_failed = self.error is not None or any(side.ticket is None for side in self.sides)
        if self._service.settings.keeps_on_disconnect and not has_failed:
            self._service.spawn(self._keep())
        else:
            self._cancel()

    def _end(self) -> None:
        """Answers it now, whatever its scheduler does."""
        error = ClosingError("the server stopped before the request was done; try again later")
        self._queue.put_nowait((self.sides[0], Failed(error=error)))

    async def _keep(self) -> None:
        """Finishes into the store, under the request's id and, behind the first image, `-1`, `-2` and so on."""
        try:
            async for _ in self.events():
                pass
            for side in self.sides:
                for index, event in side.done.items():
                    suffix = f"-{side.asked.side}" if side.asked.side else f"-{index}" if index else ""
                    await self._service.check(side.asked.body.prompt, event.output.images[0])
                    await self._service.encode(self._store, side.asked, event, f"{self._id}{suffix}")
        except Exception:
            logger.exception(
                "the images of a client that went away were not kept", extra={"fields": {"request_id": self._id}}
            )

    def _store(self, asked: Asked, event: ImageDone, name: str) -> None:
        content = file_of(asked, event)
        if not self._service.store.put(self._owner, name, content, media_type(asked)):
            message = "an image of a client that went away was not kept, as there is one of the same x-request-id"
            logger.warning(message, extra={"fields": {"request_id": self._id}})

    def _put(self, side: Side, event: Event) -> None:
        """Queues an event; images of scales while there is room, partial and finished ones, which are few, always."""
        if _pixel_bytes(event) + self._waiting_bytes > _MOST_WAITING_BYTES:
            assert isinstance(event, ScaleDone), "others have none"
            event = replace(event, image=None)
        self._waiting_bytes += _pixel_bytes(event)
        self._queue.put_nowait((side, event))

    async def _next(self) -> tuple[Side, Event]:
        side, event = await self._queue.get()
        self._waiting_bytes -= _pixel_bytes(event)
        return side, event

    def _cancel(self) -> None:
        for side in self.sides:
            if side.ticket is not None and not side.is_over:
                side.ticket.cancel()

    def _listener(self, side: Side) -> Listener:
        """Hands events of the scheduler's thread to the event loop."""

        def listen(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._put, side, event)
            except RuntimeError:
                # The event loop is closed: the server has ended, and nobody waits for this.
                logger.debug("an event came behind the end of the server")

        return listen


def _pixel_bytes(event: Event) -> int:
    """Of the image of a scale that is no partial image; 0 of all other events."""
    if not isinstance(event, ScaleDone) or event.image is None or event.partial is not None:
        return 0
    return event.image.width * event.image.height * len(event.image.getbands())


def media_type(asked: Asked) -> str:
    """Of the files of a request."""
    return f"image/{asked.encoder.format}"
