"""Hands requests on to replicas, their answers back, and hears who goes away: the client, a replica, or the server."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.server.errors import CLIENT_GONE, TIMEOUT, ApiError, closing, no_replica, replica_lost
from foveate.server.metrics import CONTENT_TYPE
from foveate.server.replicas.messages import Begun, Call, Ended, Known, Parts, Said, scope_of
from foveate.server.replicas.routing import Costs, asked_for
from foveate.server.replicas.scrape import merged
from foveate.server.service import Service
from foveate.server.streams import last_message

logger = logging.getLogger("foveate.server")

_MAKING = ("/v1/images/generations", "/v1/images/compare")
_LISTING = ("/v1/models", "/v1/sizes", "/v1/policies")
_ONE_MODEL = "/v1/models/"

_ATTEMPTS = 2
"""Replicas that a request is given to, where one ends before it has sent anything."""
_TAKE_S = 30.0
"""Seconds until a replica must have taken a request; there may be none while they are started again."""
_TELL_S = 2.0
"""Seconds between the last byte of an answer and what the gate counts of it."""
_PROBE_S = 2.0
"""The same for what probes ask."""


@runtime_checkable
class Answer(Protocol):
    """What a replica says of a request, as it comes."""

    def __aiter__(self) -> AsyncIterator[Said]:
        """In order."""

    def cancel(self) -> None:
        """Nobody waits for the rest."""


@runtime_checkable
class Replicas(Protocol):
    """All replicas."""

    @property
    def is_open(self) -> bool:
        """Whether they have been started."""

    def handle(self, call: Call) -> Answer:
        """Gives a request to one of them; on the event loop."""

    async def counted(self) -> list[tuple[str, bytes]]:
        """Name and metrics of each that answers in time."""


class Forwarder:
    """What is on its way; on the event loop."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas, self.costs = replicas, Costs()
        self._ends: set[asyncio.Future[ApiError]] = set()

    async def close(self, grace_s: float) -> bool:
        """Waits until everything on its way is answered, and answers the rest after so many seconds.

        Returns:
            Whether everything was finished.
        """
        until = time.monotonic() + grace_s
        while self._ends and time.monotonic() < until:
            await asyncio.sleep(min(0.02, max(0.0, until - time.monotonic())))
        is_done = not self._ends
        self.answer_all()
        return is_done

    def answer_all(self) -> None:
        """Answers whatever is on its way with an error, and has its replicas stop."""
        for end in self._ends:
            if not end.done():
                end.set_result(closing("the server stopped before the request was done; try again later"))

    def begins(self) -> asyncio.Future[ApiError]:
        """Notes a request; it ends early with the error that comes."""
        end: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._ends.add(end)
        return end

    def ends(self, end: asyncio.Future[ApiError]) -> None:
        """The request is over."""
        self._ends.discard(end)


class Forward:
    """The layer behind the gate of the front: takes what replicas answer, and passes the rest on."""

    def __init__(self, app: ASGIApp, service: Service, forwarder: Forwarder) -> None:
        self._app, self._service, self._forwarder = app, service, forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        asked = (scope["method"], scope["path"]) if scope["type"] == "http" else None
        if asked is None or not self._forwarder.replicas.is_open:
            await self._app(scope, receive, send)
        elif asked == ("GET", "/metrics"):
            await self._metrics(scope, send)
        elif self._service.is_closing:
            await self._app(scope, receive, send)
        elif _is_of_replicas(*asked):
            await _Passage(self._forwarder, scope, send, _TAKE_S).run(receive)
        elif asked == ("GET", "/ready"):
            await self._ready(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a replica says of itself; where there is none, what the front says: nothing is loaded."""
        try:
            await _Passage(self._forwarder, scope, send, _PROBE_S).run(receive)
        except ApiError as error:
            if error.info.code not in ("no_replica", "replica_lost"):
                raise
            await self._app(scope, receive, send)

    async def _metrics(self, scope: Scope, send: Send) -> None:
        pages = await self._forwarder.replicas.counted()
        content = await self._service.admit(merged, self._service.metrics.render(), pages)
        scope["route"] = _Route(path="/metrics")
        await _send_whole(send, content, CONTENT_TYPE)


class _Passage:
    """One request on its way."""

    def __init__(self, forwarder: Forwarder, scope: Scope, send: Send, take_s: float) -> None:
        self._forwarder, self._scope, self._send, self._take_s = forwarder, scope, send, take_s
        self._end, self._asked = forwarder.begins(), cast("str | None", None)
        self._has_begun = self._is_stream = self._is_whole = False
        scope["route"] = _Route(path=_template(scope["path"]))

    async def run(self, receive: Receive) -> None:
        """Hands it on, and its answer back.

        Raises:
            ApiError: Nothing was sent: the client has gone, or the server stops, or no replica took it.
        """
        watching = None
        try:
            call = await self._call(receive)
            watching = asyncio.create_task(self._watch(receive))
            await self._answered(call)
        except ApiError as error:
            if not self._has_begun:
                raise
            await self._cut_off(error)
        finally:
            self._forwarder.ends(self._end)
            if watching is not None:
                watching.cancel()

    async def _answered(self, call: Call) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._pass(call)
                return
            except RayError as error:
                fields = {"request_id": call.id, "attempt": attempt, "reason": type(error).__name__}
                logger.error("a replica was lost", extra={"fields": fields})
                if self._has_begun or attempt == _ATTEMPTS:
                    raise replica_lost() from None

    async def _pass(self, call: Call) -> None:
        """Sends what one replica says.

        Raises:
            ApiError: Nobody waits any more, or it took too long until a replica took the request.
            RayError: The replica has ended.
        """
        answer = self._forwarder.replicas.handle(call)
        parts = aiter(answer)
        until: float | None = time.monotonic() + self._take_s
        try:
            while not self._is_whole:
                part = await self._next(parts, until)
                if isinstance(part, Begun):
                    until = None
                elif isinstance(part, Known):
                    self._scope["state"]["policy"] = part.policy
                elif not isinstance(part, Ended):
                    await self._sent(part)
            await self._told(parts)
        except BaseException:
            answer.cancel()
            raise

    async def _next(self, parts: AsyncIterator[Said], until: float | None) -> Said:
        step = asyncio.ensure_future(anext(parts))
        try:
            timeout = None if until is None else max(0.0, until - time.monotonic())
            waited: set[asyncio.Future[Any]] = {step, self._end}
            await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                return step.result()
            if self._end.done():
                raise self._end.result()
            raise no_replica()
        finally:
            _drop(step)

    async def _sent(self, part: Parts) -> None:
        if part["type"] == "http.response.start":
            self._has_begun = True
            kinds = [value for name, value in part["headers"] if name == b"content-type"]
            self._is_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif part["type"] == "http.response.body":
            self._is_whole = not part.get("more_body", False)
        await self._send(dict(part))

    async def _told(self, parts: AsyncIterator[Said]) -> None:
        """What the gate counts and logs; the client has everything by now."""
        step = asyncio.ensure_future(anext(parts))
        await asyncio.wait({step}, timeout=_TELL_S)
        if not step.done() or step.exception() is not None or not isinstance(ended := step.result(), Ended):
            _drop(step)
            logger.error("a replica did not say how a request ended")
            return
        self._forwarder.costs.note(self._asked, ended.flops)
        state = self._scope["state"]
        state["policy"] = ended.policy
        state["error"] = None if ended.refusal is None else ended.refusal.error()
        self._scope["route"] = _Route(path=ended.route or "(none)")

    async def _cut_off(self, error: ApiError) -> None:
        """Ends an answer that has begun: a stream with an error, anything else by hanging up."""
        self._scope["state"]["error"] = error
        if error.status_code == CLIENT_GONE:
            return
        if not self._is_stream:
            raise error
        await self._send({"type": "http.response.body", "body": last_message(error), "more_body": False})

    async def _call(self, receive: Receive) -> Call:
        """The request with its whole body.

        Raises:
            ApiError: The client has gone before that.
        """
        scope, body = self._scope, bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _gone()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        state = scope["state"]
        self._asked = asked_for(bytes(body)) if scope["method"] == "POST" else None
        flops = self._forwarder.costs.of(self._asked)
        return Call(id=state["id"], owner=state["owner"], scope=scope_of(scope), body=bytes(body), flops=flops)

    async def _watch(self, receive: Receive) -> None:
        """Hears of a client that goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._end.done():
            self._end.set_result(_gone())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Route:
    """As the gate logs it."""

    path: str


def _is_of_replicas(method: str, path: str) -> bool:
    if method == "POST":
        return path in _MAKING
    return method == "GET" and (path in _LISTING or path.startswith(_ONE_MODEL))


def _template(path: str) -> str:
    """Of the route of a path that replicas answer, as the gate logs it; it may be needed before they do."""
    return f"{_ONE_MODEL}{{name:path}}" if path.startswith(_ONE_MODEL) else path


def _drop(step: asyncio.Future[Any]) -> None:
    """Waits no longer, and wants no error of it either."""
    step.cancel()
    step.add_done_callback(lambda done: done.cancelled() or done.exception())


def _gone() -> ApiError:
    return ApiError(CLIENT_GONE, "the client went away", kind=TIMEOUT, code="cancelled")


async def _send_whole(send: Send, content: bytes, kind: str) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
    start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": headers}
    await send(start)
    body: Message = {"type": "http.response.body", "body": content, "more_body": False}
    await send(body)
