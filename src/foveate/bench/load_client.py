"""One streamed request for images: when its first partial image came, how many images, and what it ended with.

Events are told apart by their names; images are counted and thrown away undecoded, as a generator that decodes them
would take the processor from the server that it measures.
"""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2

PATH = "/v1/images/generations"

_OK = 200
_PARTIAL, _COMPLETED, _ERROR = b"image_generation.partial_image", b"image_generation.completed", b"error"
_NOT_KEPT = (_PARTIAL, _COMPLETED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a request; `status` is 0 where there was no answer, and `error` is a code of few words."""

    status: int
    images: int = 0
    first_s: float | None = None
    error: str | None = None


async def ask(client: httpx2.AsyncClient, body: dict[str, Any], now: Callable[[], float]) -> Answer:
    """Sends a request with `stream` and reads its answer to the end; nothing is raised for what the server does.

    Args:
        client: Knows the server's address and key.
        body: Of the request.
        now: Seconds.
    """
    try:
        async with client.stream("POST", PATH, json=body) as response:
            if response.status_code != _OK:
                return Answer(status=response.status_code, error=_code(await response.aread()))
            return await _read(response, now, int(body["n"]))
    except httpx2.HTTPError as error:
        return Answer(status=0, error=type(error).__name__)


async def _read(response: httpx2.Response, now: Callable[[], float], wanted: int) -> Answer:
    """Reads the events; a stream that ends without all images is an error."""
    first_s, images, error = None, 0, None
    async for name, data in _events(response.aiter_raw()):
        if name in _NOT_KEPT and first_s is None:
            first_s = now()
        if name == _COMPLETED:
            images += 1
        elif name == _ERROR:
            error = _code(data)
    if error is None and images < wanted:
        error = "ended early"
    return Answer(status=_OK, images=images, first_s=first_s, error=error)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, bytes]]:
    """Names of events, each with its data; data of images is left out. An event counts once its data is complete."""
    name, rest = b"", b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b": ")
            if field == b"event":
                name = value
            elif field == b"data":
                yield name, b"" if name in _NOT_KEPT else value


def _code(content: bytes) -> str:
    """The code of an error in OpenAI's envelope, or its type."""
    try:
        error = json.loads(content)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "not in the envelope"
