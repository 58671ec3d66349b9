"""What every request passes before a handler sees it: an id, its key, limits on its body, and headers for security.

Plain ASGI, as a wrapper that buffers would hold back streams and hide that a client went away.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request
from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveate.server.errors import (
    AUTHENTICATION,
    CLIENT_GONE,
    ApiError,
    api_error,
    closing,
    error_response,
    too_many,
)
from foveate.server.hosts import check_host
from foveate.server.keys import LOCAL
from foveate.server.metrics import Reason
from foveate.server.service import Service

logger = logging.getLogger("foveate.server")

API = "/v1/"
"""Paths below need a key, where there are keys."""

_IMAGES = "/v1/images/"
_CLIENT_ID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_BEARER = "bearer "

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"

_REASONS: dict[str, Reason] = {
    "invalid_api_key": "key", "rate_limit_exceeded": "rate", "queue_full": "queue_full", "loading": "closing",
    "closing": "closing", "request_too_large": "too_large", "string_above_max_length": "too_large",
    "moderation_blocked": "moderation", "moderation_timeout": "moderation_timeout", "out_of_memory": "memory",
}  # fmt: skip
"""What is counted of the codes of errors; every other 4xx is `invalid`."""

_ERRORS, _SERVER_ERRORS = 400, 500


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on; other scopes pass as they are."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.monotonic(), Headers(scope=scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= state_of(_id_of(headers))
        answer = _Answer(send, state["id"], is_page=_is_page(scope["path"]))
        try:
            body = _Body(receive, self._service, headers)
            state["owner"] = self._admitted(scope, headers)
            await self._app(scope, body.receive, answer.send)
        except ApiError as error:
            state["error"] = error
            await error_response(error)(scope, receive, answer.send)
        except asyncio.CancelledError:
            # The server ends and waits no longer for a check or an encoder.
            if not self._service.is_closing or answer.has_begun:
                raise
            state["error"] = closing("the server stopped before the request was done; try again later")
            await error_response(state["error"])(scope, receive, answer.send)
        except Exception as error:
            if answer.is_unread or isinstance(error, SendTimeoutError):
                answer.status = CLIENT_GONE
            else:
                await self._failed(error, scope, receive, answer)
        finally:
            if state["leave"] is not None:
                state["leave"]()
            self._tell(scope, answer.status, time.monotonic() - began)

    async def _failed(self, error: Exception, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Answers a fault of ours, without its text."""
        state = scope["state"]
        logger.error("a request failed", exc_info=error, extra={"fields": {"request_id": state["id"]}})
        state["error"] = api_error(error)
        if not answer.has_begun:
            await error_response(state["error"])(scope, receive, answer.send)

    def _admitted(self, scope: Scope, headers: Headers) -> str:
        """Whose request it is.

        Raises:
            ApiError: It is for another host, has no key, too many came with it, or its body is too large.
        """
        path, service = scope["path"], self._service
        check_host(headers, service.settings.hosts)
        owner = self._owner(headers) if path.startswith(API) else LOCAL
        is_work = scope["method"] == "POST" and path.startswith(_IMAGES)
        if is_work and service.is_closing:
            raise closing()
        if is_work and (wait_s := service.rate.wait_s(owner)) > 0:
            most = service.settings.limits.requests_per_minute
            message = f"this key may send {most:g} requests a minute; come again in {wait_s:.1f} s"
            raise too_many(message, wait_s, "rate_limit_exceeded")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > service.settings.limits.body_bytes:
            raise _too_large(service.settings.limits.body_bytes)
        return owner

    def _owner(self, headers: Headers) -> str:
        """Who the key belongs to.

        Raises:
            ApiError: There is none, or no such key.
        """
        keys = self._service.settings.keys
        if not keys.is_required:
            return LOCAL
        given = headers.get("authorization", "")
        if not given.lower().startswith(_BEARER):
            raise _no_key("this server needs an API key, in the header Authorization: Bearer KEY")
        owner = keys.owner(given[len(_BEARER) :].strip())
        if owner is None:
            raise _no_key("there is no such API key")
        return owner

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts and logs the answer; paths are those of routes, as others may hold anything."""
        state, route = scope["state"], scope.get("route")
        error: ApiError | None = state["error"]
        reason = None if error is None else _reason(error)
        if error is not None and status < _ERRORS:
            # A stream that failed behind its first byte.
            status = error.status_code
        if scope["path"].startswith(_IMAGES) and scope["method"] == "POST":
            self._service.metrics.finished(status, state["policy"], seconds)
            if reason is not None:
                self._service.metrics.rejected(reason)
        path = str(getattr(route, "path", "(none)"))
        method = str(scope["method"])
        self._service.log.answered(state["id"], method=method, path=path, status=status, seconds=seconds, reason=reason)


class _Body:
    """The body of a request, as far as it may be large and slow."""

    def __init__(self, receive: Receive, service: Service, headers: Headers) -> None:
        limits = service.settings.limits
        self._receive, self._most = receive, limits.body_bytes
        self._bytes, self._is_whole = 0, False
        self._until = asyncio.get_running_loop().time() + limits.body_seconds

    async def receive(self) -> Message:
        """The next part.

        Raises:
            ApiError: The body is too large, or takes too long.
        """
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise _hanging_up(408, "the body of the request took too long", "request_timeout") from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._bytes > self._most:
                raise _too_large(self._most)
        return message


class _Answer:
    """What is sent, with headers that every answer has; remembers the status, 499 if nothing was sent.

    `is_unread` once sending failed: the client reads no more.
    """

    def __init__(self, send: Send, request_id: str, *, is_page: bool) -> None:
        self._send, self._id, self._is_page = send, request_id, is_page
        self.status = CLIENT_GONE
        self.has_begun = self.is_unread = False

    async def send(self, message: Message) -> None:
        """Sends a message."""
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            headers["Content-Security-Policy"] = _PAGE_POLICY if self._is_page else _API_POLICY
            headers["Cross-Origin-Opener-Policy"] = "same-origin"
            headers["X-Frame-Options"] = "DENY"
            headers.setdefault("Cache-Control", "no-store")
        try:
            await self._send(message)
        except OSError:
            self.is_unread = True
            raise


def owner_of(request: Request) -> str:
    """Whose request it is."""
    return str(request.state.owner)


def id_of(request: Request) -> str:
    """Of the header `x-request-id`."""
    return str(request.state.id)


def state_of(request_id: str) -> dict[str, Any]:
    """What layers and handlers know of a request, before anything is known but its id."""
    return {"id": request_id, "owner": LOCAL, "error": None, "policy": None, "known": None, "leave": None}


def note_policy(request: Request, policy: str) -> None:
    """Notes the label that a request is counted by, and tells who wants to know it before the end."""
    request.state.policy = policy
    if request.state.known is not None:
        request.state.known(policy)


def on_leaving(request: Request, call: Callable[[], None]) -> None:
    """Has a function called when the answer is sent, or its client has gone away."""
    request.state.leave = call


def _id_of(headers: Headers) -> str:
    """An id that nobody can guess; a UUID that the client sends is taken, so that it knows it before the answer."""
    given = headers.get("x-request-id", "")
    return given.lower() if _CLIENT_ID.fullmatch(given) else secrets.token_urlsafe(18)


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/page/")


def _reason(error: ApiError) -> Reason | None:
    """Why a request was refused; None where it failed later, its client went away, or there is no such path."""
    if error.status_code == CLIENT_GONE or error.info.code == "not_found":
        return None
    found = _REASONS.get(error.info.code or "")
    return found or ("invalid" if error.status_code < _SERVER_ERRORS else None)


def _no_key(message: str) -> ApiError:
    challenge = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, kind=AUTHENTICATION, code="invalid_api_key", headers=challenge)


def _too_large(most: int) -> ApiError:
    return _hanging_up(413, f"the body must have {most} bytes or less", "request_too_large")


def _hanging_up(status: int, message: str, code: str) -> ApiError:
    """An error behind which the connection is closed, as the rest of the body may still come."""
    return ApiError(status, message, code=code, headers={"Connection": "close"})
