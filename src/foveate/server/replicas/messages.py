"""What goes between the front and a replica: a request, and the messages of ASGI that answer it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.server.errors import ApiError
from foveate.server.schemas import ErrorInfo

Parts = Mapping[str, Any]
"""A message of ASGI: the beginning of an answer, or a part of its body."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request that the gate has let in, read whole.

    Attributes:
        id: Of the header `x-request-id`.
        owner: Whose it is, as `Keys.owner` says it.
        scope: The entries of ASGI's scope that name the request.
        body: Of the request.
        flops: That it will take, as far as the front knows; for routing.
    """

    id: str
    owner: str
    scope: Mapping[str, Any]
    body: bytes = b""
    flops: float = 0.0


_SCOPE = ("type", "asgi", "http_version", "server", "client", "scheme", "root_path", "method", "path", "raw_path",
          "query_string", "headers")  # fmt: skip
"""Entries that a replica needs."""

_SECRET = (b"authorization", b"proxy-authorization", b"cookie", b"x-api-key", b"api-key")
"""Headers of the gate's, which no replica needs and no other process shall see."""


def scope_of(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ASGI's scope that a replica needs, without keys of clients."""
    kept = {name: scope[name] for name in _SCOPE if name in scope}
    return {**kept, "headers": [(name, value) for name, value in scope["headers"] if name.lower() not in _SECRET]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A replica has the request."""

    replica: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """The request was checked; `policy` is the label of its policy, which the front counts it by if it never ends."""

    policy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An `ApiError` on its way; exceptions of HTTP do not pickle."""

    status: int
    info: ErrorInfo
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: ApiError) -> "Refusal":
        """As it travels."""
        return cls(status=error.status_code, info=error.info, headers=dict(error.headers or {}))

    def error(self) -> ApiError:
        """As it is raised."""
        info = self.info
        return ApiError(
            self.status, info.message, kind=info.type, param=info.param, code=info.code, headers=dict(self.headers)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The answer is complete.

    Attributes:
        policy: The label of its policy; None where it never became known.
        route: The template of its path.
        refusal: What it was answered with, also where a stream ended so.
        flops: Of the transformer, that were forecast for it; 0 where nothing ran.
    """

    policy: str | None
    route: str | None
    refusal: Refusal | None
    flops: float = 0.0


Said = Begun | Known | Parts | Ended
"""What a replica says of a request, in this order."""
