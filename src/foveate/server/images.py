"""`POST /v1/images/generations` and `/v1/images/compare`, whole or as streams, and `GET /v1/images/{id}`."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json

from foveate.server import bodies, streams
from foveate.server.admission import Asked, asked_of, sides_of
from foveate.server.errors import ApiError, api_error, client_gone
from foveate.server.exchange import Exchange
from foveate.server.gate import id_of, note_policy, on_leaving, owner_of
from foveate.server.reproduce import Origin
from foveate.server.schemas import (
    AcceptedEvent,
    ComparedEvent,
    CompareReply,
    CompareRequest,
    CompletedEvent,
    ErrorEvent,
    ErrorReply,
    ImageRequest,
    ImagesReply,
    PartialImageEvent,
    QueueEvent,
    ScaleEvent,
)
from foveate.server.service import Service, service_of

_MOST_FIELDS = 64

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "A field is refused; `param` names it. Also: no such field, no JSON."},
    401: {"model": ErrorReply, "description": "No key, or a wrong one."},
    404: {"model": ErrorReply, "description": "Another model than the loaded one."},
    408: {"model": ErrorReply, "description": "The body took too long."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    429: {"model": ErrorReply, "description": "The queue is full, or too many came with this key; see Retry-After."},
    500: {"model": ErrorReply, "description": "The server failed; its log says why."},
    503: {"model": ErrorReply, "description": "The model is being loaded, or the server stops."},
    504: {"model": ErrorReply, "description": "Behind latency_budget_ms, with on_late error."},
    507: {"model": ErrorReply, "description": "The image cannot be kept for its url."},
}


def _answers(model: type[BaseModel], *events: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What an endpoint answers, for its description."""
    names = ", ".join(str(event.model_fields["type"].default) for event in events)
    whole = {
        "model": model,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": f"The images; with stream, events: {names}.",
    }
    return {200: whole, **_ERRORS}


class StrictRoute(APIRoute):
    """A route whose JSON is that of the standard: no NaN, no infinity, no half of a surrogate pair."""

    def get_route_handler(self) -> Any:  # noqa: ANN401 - as in the base
        """The handler, with such requests."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:  # noqa: ANN401 - whatever the body holds
        """The body.

        Raises:
            ApiError: It is no JSON, or has so many fields that checking each would hold up everybody.
        """
        try:
            found = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
        if isinstance(found, dict) and len(found) > _MOST_FIELDS:
            raise ApiError(400, f"the body must have {_MOST_FIELDS} fields or less, got {len(found)}")
        return found


router = APIRouter(prefix="/v1/images", route_class=StrictRoute, tags=["images"])


@router.post(
    "/generations",
    responses=_answers(
        ImagesReply, PartialImageEvent, CompletedEvent, ErrorEvent, AcceptedEvent, QueueEvent, ScaleEvent
    ),
    summary="Generate images",
)
async def generate(body: ImageRequest, request: Request) -> Response:
    """Generates n images of a prompt, whole or as a stream."""
    service = service_of(request)
    pipe, _ = service.opened()
    asked = await service.admit(asked_of, body, pipe, service.settings, owner_of(request))
    await service.check(body.prompt)
    exchange = await _begun(request, service, [asked])
    if body.stream:
        return streams.streamed(exchange, service, _origin(request))
    return await _whole(exchange, request, bodies.images_body)


@router.post(
    "/compare",
    responses=_answers(
        CompareReply,
        PartialImageEvent,
        CompletedEvent,
        ComparedEvent,
        ErrorEvent,
        AcceptedEvent,
        QueueEvent,
        ScaleEvent,
    ),
    summary="Compare two policies",
)
async def compare(body: CompareRequest, request: Request) -> Response:
    """Generates one image under two policies with the same random numbers, and says how far they are apart."""
    service = service_of(request)
    pipe, _ = service.opened()
    sides = await service.admit(sides_of, body, pipe, service.settings, owner_of(request))
    await service.check(body.prompt)
    exchange = await _begun(request, service, sides)
    if body.stream:
        return streams.streamed(exchange, service, _origin(request))
    return await _whole(exchange, request, bodies.compare_body)


@router.post("/edits", include_in_schema=False)
@router.post("/variations", include_in_schema=False)
async def unsupported() -> None:
    """Refuses what OpenAI has and no next-scale model here can do.

    Raises:
        ApiError: Always.
    """
    raise ApiError(404, "this server generates images; it has no edits and no variations", code="not_found")


@router.get(
    "/{image_id}",
    responses={
        200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}, "description": "The file."},
        401: _ERRORS[401],
        404: {"model": ErrorReply, "description": "No such image of this key, or it has expired."},
    },
    response_class=Response,
    summary="Fetch a kept image",
)
async def fetch(image_id: Annotated[str, Path(max_length=64)], request: Request) -> Response:
    """Sends a kept image to the key that made it."""
    service = service_of(request)
    found = await service.admit(service.store.get, owner_of(request), image_id)
    if found is None:
        raise ApiError(404, "no such image; urls expire, and belong to the key that made them", code="not_found")
    content, kind = found
    return Response(content, media_type=kind, headers={"Cache-Control": "private, no-store"})


async def _begun(request: Request, service: Service, asked: Sequence[Asked]) -> Exchange:
    """Submits a request; when its answer is sent or its client has gone, the exchange hears of it."""
    note_policy(request, service.metrics.policy(asked[0].work))
    exchange = Exchange(service, asked, id_of(request), owner_of(request))
    on_leaving(request, exchange.leave)
    await service.admit(exchange.submit, request.headers)
    request.state.flops = exchange.flops
    return exchange


async def _whole(exchange: Exchange, request: Request, make: Callable[[Exchange, Service, Origin], str]) -> Response:
    """The answer of a request without stream: waits for all images, has them checked, and encodes them.

    Raises:
        ApiError: Something failed, or the client went away.
    """
    service = service_of(request)

    async def made() -> str:
        try:
            async for _ in exchange.events():
                pass
            await exchange.check()
            return await service.encode(make, exchange, service, _origin(request))
        except Exception as error:
            exchange.error = api_error(error)
            raise

    body = await _unless_gone(request, made())
    exchange.is_answered = True
    return Response(body, media_type="application/json")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, str]) -> str:
    """What a coroutine returns; it is cancelled when the client goes away.

    Raises:
        ApiError: The client went away.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_gone()
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _origin(request: Request) -> Origin:
    settings = service_of(request).settings
    return Origin(base_url=str(request.base_url), has_keys=settings.keys.is_required, model_flags=settings.model_flags)
