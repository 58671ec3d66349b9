"""How the server is: `/health`, `/ready`, `/metrics` and `/version`; none of them needs a key."""

import platform

import torch
from fastapi import APIRouter, Request, Response

from foveate.core.version import __version__
from foveate.pipeline.output import describe_kernels
from foveate.server.admission import told
from foveate.server.metrics import CONTENT_TYPE
from foveate.server.schemas import Health, Ready, Version
from foveate.server.service import service_of

router = APIRouter(tags=["status"])

_NOT_READY = 503


@router.get("/health", summary="Alive")
async def health() -> Health:
    """The process answers, whatever else it does."""
    return Health()


@router.get(
    "/ready",
    responses={_NOT_READY: {"model": Ready, "description": "The model is being loaded, or the server stops."}},
    summary="Takes requests",
)
async def ready(request: Request, response: Response) -> Ready:
    """Whether the model is loaded and warm and requests are taken, and which kernels run."""
    service = service_of(request)
    if service.is_closing or not service.is_loaded:
        response.status_code = _NOT_READY
        return Ready(status="closing" if service.is_closing else "loading")
    pipe, _ = service.opened()
    model = pipe.model
    kernels = "triton" if pipe.runner.uses_triton else describe_kernels(model.device)
    return Ready(status="ready", model=model.spec.name, kernels=kernels, warnings=list(told(pipe.warnings)))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "In Prometheus' text format."}},
    summary="Prometheus",
)
async def metrics(request: Request) -> Response:
    """What is counted, without prompts and keys."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


@router.get("/version", summary="Versions")
async def version() -> Version:
    """Of what runs."""
    return Version(foveate=__version__, torch=torch.__version__, python=platform.python_version())
