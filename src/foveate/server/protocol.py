"""HTTP as uvicorn reads it with httptools, and what that leaves out: times and bytes for slow and endless requests.

Headers must be here in time and of some size, a body must end, and what is no HTTP is answered in the envelope.
"""

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from foveate.server.errors import INVALID, SERVER
from foveate.server.limits import Limits
from foveate.server.schemas import ErrorInfo, ErrorReply

MAX_HEADER_BYTES = 64 * 1024

_REASONS = {
    400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable",
}  # fmt: skip

_SLACK_S = 1.0
"""Behind the time for a body, in which the application says that it is up."""


class TimedProtocol(HttpToolsProtocol):
    """One connection; `timed_protocol` makes the class that has limits."""

    limits: ClassVar[Limits] = Limits()
    _timer: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base
        """Takes a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections; try again later", SERVER, "overloaded")
            return
        self._arm_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if not self._in_headers:
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            message = f"the headers must have {MAX_HEADER_BYTES} bytes or less"
            self._refuse(431, message, INVALID, "headers_too_large")

    def on_message_begin(self) -> None:
        """The first byte of a request is here."""
        super().on_message_begin()
        self._in_headers = True
        self._arm_for_headers()

    def on_headers_complete(self) -> None:
        """All headers are here; the body has its own time."""
        self._in_headers = False
        self._disarm()
        self._timer = self.loop.call_later(self.limits.body_seconds + _SLACK_S, self.transport.close)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The whole request is here."""
        self._disarm()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        super().resume_writing()

    def _watch_reader(self, waiting: int) -> None:
        """Hangs up on a client that reads nothing at all; one that is slow has all the time that it needs."""

        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < waiting:
                self._watch_reader(now)
            else:
                self.transport.abort()

        self._reader = self.loop.call_later(self.limits.send_seconds, look)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP."""
        self._refuse(400, msg, INVALID, "invalid_http")

    def _arm_for_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.header_seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(408, "the headers of the request took too long", INVALID, "request_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, kind: str, code: str) -> None:
        """Answers in the envelope and hangs up."""
        self._disarm()
        content = ErrorReply(error=ErrorInfo(message=message, type=kind, param=None, code=code)).model_dump_json()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content.encode())}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + content).encode())
        self.transport.close()


def timed_protocol(limits: Limits) -> type[TimedProtocol]:
    """A protocol with these limits, as uvicorn makes connections from a class."""
    return type("TimedProtocol", (TimedProtocol,), {"limits": limits})
