"""Requests with stream: server-sent events while images form, each named by the type of its JSON."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from foveate.server import replies
from foveate.server.errors import ApiError, api_error, client_gone, closing
from foveate.server.exchange import Exchange, Side
from foveate.server.reproduce import Origin
from foveate.server.schemas import ComparedEvent, ErrorEvent, QueueEvent
from foveate.server.service import Service
from foveate.server.work import Event, ImageDone, ScaleDone

logger = logging.getLogger("foveate.server")

_PING_S = 15
"""Seconds of silence behind which a comment is sent, so that no proxy hangs up."""


class _Response(EventSourceResponse):
    """A stream whose end the gate hears of, an error or a client that left: its status 200 was sent long before."""

    def __init__(self, exchange: Exchange, content: AsyncIterator[ServerSentEvent], **settings: Any) -> None:
        super().__init__(content, **settings)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        cut_off = client_gone()
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            cut_off = closing("the server stopped before the request was done; try again later")
            raise
        finally:
            scope["state"]["error"] = self._exchange.error or (None if self._exchange.is_answered else cut_off)


def streamed(exchange: Exchange, service: Service, origin: Origin) -> EventSourceResponse:
    """The response of a request with stream."""
    return _Response(
        exchange,
        _messages(exchange, service, origin),
        ping=_PING_S,
        send_timeout=service.settings.limits.send_seconds,
        headers={"Cache-Control": "no-store"},
    )


async def _messages(exchange: Exchange, service: Service, origin: Origin) -> AsyncIterator[ServerSentEvent]:
    """All messages of a stream; an error is its last one."""
    try:
        async for event in _Stream(exchange, service, origin).events():
            yield _message(event)
        exchange.is_answered = True
    except Exception as error:
        exchange.error = found = api_error(error)
        if not isinstance(error, ApiError):
            logger.exception("a stream failed", extra={"fields": {"request_id": exchange.id}})
        yield _message(ErrorEvent(error=found.info))
    finally:
        exchange.leave()


class _Stream:
    """What a stream says, in order."""

    def __init__(self, exchange: Exchange, service: Service, origin: Origin) -> None:
        self._exchange, self._service, self._origin = exchange, service, origin
        self._is_traced = bool(exchange.sides[0].asked.body.trace)
        self._positions = {side: side.position for side in exchange.sides}
        self._last: dict[tuple[Side, int], ScaleDone] = {}

    async def events(self) -> AsyncIterator[BaseModel]:
        """All events.

        Raises:
            ApiError: The request failed.
        """
        sides, origin = self._exchange.sides, self._origin
        if self._is_traced:
            for side in sides:
                yield replies.accepted(side.asked, self._exchange.id, side.position)
        async for side, event in self._exchange.events(ticks=self._is_traced):
            if self._is_traced and (position := side.position) != self._positions[side]:
                self._positions[side] = position
                yield QueueEvent(side=side.asked.side, position=position)
            for message in await self._said(side, event):
                yield message
        if len(sides) > 1:
            a, b = (side.made(side.done[0], origin) for side in sides)
            yield ComparedEvent(fidelity=await self._service.encode(replies.fidelity_of, a, b))

    async def _said(self, side: Side, event: Event | None) -> list[BaseModel]:
        """What is said of an event."""
        if isinstance(event, ImageDone):
            made = side.made(event, self._origin)
            before = await self._last_scale(side, event)
            await self._service.check(side.asked.body.prompt, event.output.images[0])
            return [*before, await self._service.encode(replies.completed, side.asked, made)]
        if not isinstance(event, ScaleDone):
            return []
        if self._is_traced and event.scale == event.num_scales - 1:
            # Its image is the finished one, which is decoded next.
            self._last[side, event.index] = event
            return []
        return await self._of_scale(side, event)

    async def _last_scale(self, side: Side, done: ImageDone) -> list[BaseModel]:
        scale = self._last.pop((side, done.index), None)
        if scale is None:
            return []
        return await self._of_scale(side, replace(scale, image=done.output.images[0]))

    async def _of_scale(self, side: Side, event: ScaleDone) -> list[BaseModel]:
        if event.image is not None:
            await self._service.check(side.asked.body.prompt, event.image)
        return [*await self._service.encode(replies.of_scale, side.asked, event)]


def last_message(error: ApiError) -> bytes:
    """The end of a stream whose process has gone, as it would have sent it."""
    return _message(ErrorEvent(error=error.info)).encode()


def _message(event: BaseModel) -> ServerSentEvent:
    """One message, whose name is the type of its event."""
    leaves_out = {"side"} if getattr(event, "side", "") is None else None
    return ServerSentEvent(data=event.model_dump_json(exclude=leaves_out), event=getattr(event, "type"))  # noqa: B009
