"""Errors as clients see them: OpenAI's envelope with a message, a type, the field and a code; never a stack trace."""

import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from foveate.core.errors import Cancelled, FoveateError, is_out_of_memory, unknown
from foveate.server.schemas import CompareRequest, ErrorInfo, ErrorReply, ImageRequest
from foveate.server.store import StoreFullError
from foveate.server.work import ClosingError, LateError, QueueFullError

INVALID, AUTHENTICATION, RATE, SERVER, TIMEOUT = (
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error", "timeout_error",
)  # fmt: skip
"""Types of errors."""

CLIENT_GONE = 499
"""What the log says of an answer that nobody waited for."""

_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients try most errors of a server again; that would repeat work whose end is known."""

_LONGEST, _LONGEST_VALUE = 1000, 80
"""Characters of a message, and of a value in it."""

_FIELDS = {*ImageRequest.model_fields, *CompareRequest.model_fields}
_RENAMED = {
    "num_images_per_prompt": "n", "width": "size", "height": "size", "aspect_ratio": "size", "pixels": "size",
    "cfg": "guidance_scale", "tau": "temperature",
}  # fmt: skip
"""Options of a call whose field has another name."""

_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(HTTPException):
    """An answer that is an error.

    Attributes:
        info: What the envelope holds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = "invalid_value",
        headers: dict[str, str] | None = None,
    ) -> None:
        """`status` is of HTTP, `kind` one of the types, `param` the field."""
        super().__init__(status, message, headers)
        self.info = ErrorInfo(message=_shortened(message, _LONGEST), type=kind, param=param, code=code)

    def __str__(self) -> str:
        """The message."""
        return self.info.message


def api_error(error: Exception) -> ApiError:
    """What a client hears of an error; of one that is nobody's wish it hears no text, as that may hold anything."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return too_many(str(error), error.retry_after_s, "queue_full")
    if isinstance(error, FoveateError):
        return _known(error)
    if isinstance(error, Cancelled):
        return client_gone("the request was cancelled")
    if is_out_of_memory(error):
        message = "the server ran out of memory with this request; ask for fewer or smaller images"
        return ApiError(500, message, kind=SERVER, code="out_of_memory", headers=_NO_RETRY)
    return ApiError(500, "the server failed; its log says why", kind=SERVER, code="internal_error")


def _known(error: FoveateError) -> ApiError:
    """An error with a remedy."""
    message = str(error)
    if isinstance(error, ClosingError):
        return closing(message)
    if isinstance(error, LateError):
        return ApiError(504, message, kind=TIMEOUT, param="latency_budget_ms", code="late", headers=_NO_RETRY)
    if isinstance(error, StoreFullError):
        return ApiError(507, message, kind=SERVER, param="response_format", code="store_full", headers=_NO_RETRY)
    return ApiError(400, message, param=param_of(message))


def param_of(message: str) -> str | None:
    """The field that the message of an option's check begins with, as they all do; None if it is another message."""
    first = re.match(r"[a-z_]+", message)
    name = "" if first is None else _RENAMED.get(first[0], first[0])
    return name if name in _FIELDS else None


def too_many(message: str, retry_after_s: float, code: str) -> ApiError:
    """429, and when to come again."""
    seconds = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    return ApiError(429, message, kind=RATE, code=code, headers=seconds)


def client_gone(message: str = "the client went away") -> ApiError:
    """499, as nginx calls it, of a client that left before it had its answer; for log and metrics."""
    return ApiError(CLIENT_GONE, message, kind=TIMEOUT, code="cancelled")


def closing(message: str = "the server stops and takes no more requests") -> ApiError:
    """503 of a server that stops."""
    return ApiError(503, message, kind=SERVER, code="closing", headers={"Retry-After": "5"})


def replica_lost() -> ApiError:
    """503 of a request whose replica has gone, and that was not or could not be given to another one."""
    message = "the process that ran the request has ended; send it again"
    return ApiError(503, message, kind=SERVER, code="replica_lost", headers={"Retry-After": "1"})


def loading() -> ApiError:
    """503 of a server that is not ready yet."""
    message = "the model is being loaded; /ready says when it is"
    return ApiError(503, message, kind=SERVER, code="loading", headers={"Retry-After": "5"})


def no_replica() -> ApiError:
    """503 of a request that no replica took: they are started again, or do not answer."""
    message = "no replica took the request in time; /ready says when one answers"
    return ApiError(503, message, kind=SERVER, code="no_replica", headers={"Retry-After": "5"})


def error_response(error: ApiError) -> Response:
    """The envelope as a response."""
    content = ErrorReply(error=error.info).model_dump_json()
    return Response(content, error.status_code, error.headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Every error that a handler raises with a meaning comes in the envelope; the gate answers all others."""

    async def failed(request: Request, error: Exception) -> Response:
        found = _of_framework(request, error)
        request.state.error = found
        return error_response(found)

    for kind in (HTTPException, RequestValidationError, FoveateError):
        app.add_exception_handler(kind, failed)


def _of_framework(request: Request, error: Exception) -> ApiError:
    """Errors that the framework raises, or that escaped a handler."""
    if isinstance(error, RequestValidationError):
        body = CompareRequest if request.url.path.endswith("/compare") else ImageRequest
        return invalid(error.errors(), list(body.model_fields))
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        code = _CODES.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, str(error.detail), code=code, headers=dict(error.headers or {}))
    return api_error(error)


def invalid(errors: Sequence[Any], known: Sequence[str]) -> ApiError:
    """The first of the errors that pydantic found in a body, whose fields may be those that are `known`."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part not in ("body", "path", "query")]
    param, kind = where[0] if where else None, error["type"]
    if param is None:
        return ApiError(400, "the body must be a JSON object, with the header content-type: application/json")
    if kind == "extra_forbidden":
        return unknown_field(param, known)
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    value = _shortened(repr(error.get("input")), _LONGEST_VALUE)
    return ApiError(400, f"{param}: {_lower(error['msg'])}, got {value}", param=param)


def unknown_field(name: str, known: Sequence[str]) -> ApiError:
    """A field that there is not, and the nearest one that there is."""
    message = str(unknown("field", _shortened(name, _LONGEST_VALUE), sorted(known)))
    return ApiError(400, message, param=_shortened(name, _LONGEST_VALUE), code="unknown_parameter")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
