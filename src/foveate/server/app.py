"""The application: OpenAI's images API over a scheduler, and what operators need around it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from foveate.core.version import __version__
from foveate.pipeline.pipeline import Pipeline
from foveate.server import images, listings, status
from foveate.server.errors import add_error_handlers
from foveate.server.gate import Gate
from foveate.server.pages import page_router
from foveate.server.service import Service
from foveate.server.settings import ServerSettings
from foveate.server.store import Store
from foveate.server.work import Scheduling

_SWEEP_S = 60.0
"""How often expired images are deleted."""

_ABOUT = """Next-scale image models behind OpenAI's images API: coarse images while an image forms, policies that decide
how much of the model runs, and all that makes an image again.

Errors come as `{"error": {"message", "type", "param", "code"}}`, and what answers a request has an `x-request-id`."""

_bearer = HTTPBearer(auto_error=False, description="An API key, where the server has keys.")


Outer = Callable[[ASGIApp, Service], ASGIApp]
"""What every request passes before a handler sees it."""


def create_app(
    pipe: Pipeline | None,
    scheduler: Scheduling | None,
    settings: ServerSettings,
    *,
    outer: Outer = Gate,
    store: Store | None = None,
    has_model: bool = True,
) -> FastAPI:
    """The application.

    Args:
        pipe: The model; None while it is loaded, and then `app.state.service.open` follows.
        scheduler: Of the same model; it stays the caller's to close.
        settings: How it runs.
        outer: The outermost layer; by default the gate, which knows keys and limits.
        store: Of finished images; by default one of the application's own.
        has_model: Whether it will have one; False where `outer` hands requests for images on.

    Raises:
        FoveateError: The folder for finished images cannot be made.
    """
    service = Service(settings, store, has_model=has_model)
    if pipe is not None and scheduler is not None:
        service.open(pipe, scheduler)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(service))
        try:
            yield
        finally:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper
            service.release()

    app = _Application(
        title="foveate",
        version=__version__,
        description=_ABOUT,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # Spans are ours (`spans`); the framework's hold what clients sent, prompts too.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=lifespan,
        middleware=[*_cors(settings.origins), Middleware(_layer, outer, service)],
    )
    app.state.service = service
    add_error_handlers(app)
    for router in (images.router, listings.router):
        app.include_router(router, dependencies=[Security(_has_key)])
    app.include_router(status.router)
    app.include_router(page_router())
    return app


def _layer(app: ASGIApp, outer: Outer, service: Service) -> ASGIApp:
    """As the framework makes layers."""
    return outer(app, service)


class _Application(FastAPI):
    """FastAPI's, whose description says how errors really look."""

    def openapi(self) -> dict[str, Any]:
        """The description, without the framework's own errors, which no client gets."""
        found = super().openapi()
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        return found


async def _has_key(_key: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> None:
    """Says in the description that a key is needed; the gate has checked it."""


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    """Lets browsers in from other origins, where some are named."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            # OpenAI's client of JavaScript sends a dozen of its own, x-stainless-*.
            allow_headers=["*"],
            expose_headers=["x-request-id", "Retry-After"],
        )
    ]


async def _sweep(service: Service) -> None:
    """Deletes expired images now and then."""
    while True:
        await asyncio.sleep(_SWEEP_S)
        await service.admit(service.store.expire)
