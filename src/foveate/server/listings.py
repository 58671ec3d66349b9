"""What there is to ask for: `/v1/models`, `/v1/policies` and `/v1/sizes`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request

from foveate.core.errors import FoveateError
from foveate.core.schedule import ScaleSchedule, ratio_name
from foveate.families.spec import ModelSpec
from foveate.pipeline.output import describe_precision
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.catalogue import all_entries
from foveate.policies.registry import load_policy, provenance_of
from foveate.server.errors import ApiError
from foveate.server.schemas import (
    ErrorReply,
    FieldInfo,
    ModelInfo,
    ModelList,
    PolicyEntry,
    PolicyList,
    SizeInfo,
    SizeList,
)
from foveate.server.service import Service, service_of

_CREATED = 0
"""Models of OpenAI's list have a date; ours have none."""

router = APIRouter(
    prefix="/v1",
    tags=["listings"],
    responses={
        401: {"model": ErrorReply, "description": "No key, or a wrong one."},
        503: {"model": ErrorReply, "description": "The model is being loaded, or the server stops."},
    },
)


@router.get("/models", summary="The loaded model")
async def models(request: Request) -> ModelList:
    """Lists the loaded model, under each of its names."""
    service = service_of(request)
    return ModelList(data=_models(service))


@router.get(
    "/models/{name:path}",
    responses={404: {"model": ErrorReply, "description": "Another model than the loaded one."}},
    summary="One model",
)
async def model(name: str, request: Request) -> ModelInfo:
    """Describes the loaded model.

    Raises:
        ApiError: The name is another one.
    """
    found = {entry.id: entry for entry in _models(service_of(request))}
    if name not in found:
        message = f"no model {name[:80]!r} here; there is {', '.join(found)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return found[name]


@router.get("/sizes", summary="Possible sizes")
async def sizes(request: Request) -> SizeList:
    """Lists every size that can be asked for, the smallest first."""
    service = service_of(request)
    pipe, _ = service.opened()
    found = _sizes(pipe.model.spec, service.settings.limits.pixels)
    return SizeList(data=sorted(found, key=lambda size: (size.width * size.height, size.width)))


@router.get("/policies", summary="Policies and presets")
async def policies(request: Request) -> PolicyList:
    """Lists what decides how much of the model runs, with fields and defaults, and whether it fits the loaded model."""
    service = service_of(request)
    pipe, _ = service.opened()
    return await service.admit(_policies, pipe)


def _models(service: Service) -> list[ModelInfo]:
    pipe, _ = service.opened()
    model = pipe.model
    spec = model.spec
    width, height = _default_size(spec)
    facts: dict[str, Any] = {
        "name": spec.name,
        "family": spec.family,
        "weights": {"kind": model.weights, "sha256": model.sha256},
        **describe_precision(model.precision),
        "device": model.device.type,
        "default_size": f"{width}x{height}",
        "num_scales": len(spec.default_schedule),
        "num_blocks": model.transformer.shape.num_blocks,
        "defaults": {
            "guidance_scale": spec.defaults.guidance_scale,
            "temperature": spec.defaults.temperature,
            "top_k": spec.defaults.top_k,
            "top_p": spec.defaults.top_p,
        },
        "has_negative_prompts": spec.kind.has_negatives,
        "names_classes": spec.conditioning.names_classes,
    }
    names = dict.fromkeys((spec.name, *service.settings.aliases))
    return [ModelInfo(id=name, created=_CREATED, owned_by="foveate", foveate=facts) for name in names]


def _default_size(spec: ModelSpec) -> tuple[int, int]:
    rows, columns = spec.default_schedule.grids[-1]
    return columns * spec.stride, rows * spec.stride


def _sizes(spec: ModelSpec, most: int | None) -> list[SizeInfo]:
    return [
        _size(spec, spec.schedule(ratio, pixels), (width, height), (ratio_name(ratio), pixels), most)
        for (width, height), (ratio, pixels) in spec.sizes().items()
    ]


def _size(
    spec: ModelSpec, schedule: ScaleSchedule, size: tuple[int, int], name: tuple[str, str], most: int | None
) -> SizeInfo:
    width, height = size
    ratio, pixels = name
    return SizeInfo(
        size=f"{width}x{height}",
        width=width,
        height=height,
        aspect_ratio=ratio,
        pixels=pixels,
        grids=list(schedule.grids),
        num_scales=len(schedule),
        tokens=schedule.num_tokens,
        is_default=size == _default_size(spec),
        is_trained=ratio in spec.ratios and pixels in spec.budgets,
        is_allowed=most is None or width * height <= most,
    )


def _policies(pipe: Pipeline) -> PolicyList:
    """Everything with a name; called in a thread, as binding all of them takes a while."""
    found = all_entries()
    return PolicyList(
        data=[_entry(entry, pipe) for entry in found["policies"]],
        presets=[_entry(entry, pipe) for entry in found["presets"]],
    )


def _entry(entry: dict[str, Any], pipe: Pipeline) -> PolicyEntry:
    name, model = entry["name"], pipe.model
    policy, measured, reason = load_policy(name), provenance_of(name), None
    try:
        with _quiet():
            policy.bind(model.spec.default_schedule, model.transformer.shape)
    except FoveateError as error:
        reason = str(error)
    facts: dict[str, Any] = {}
    if measured is not None:
        is_here = measured.model is not None and measured.is_of(model.spec.name, model.sha256)
        facts = {"bound": list(measured.bound), "measured_on": measured.model, "is_measured": is_here}
    return PolicyEntry(
        name=name,
        title=entry["summary"] or entry["details"],
        details=entry["details"],
        fields=[FieldInfo(**field) for field in entry["fields"]],
        spec=policy.spec,
        is_possible=reason is None,
        reason=reason,
        **facts,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps this thread's warnings from the log: each load of the page lists policies, and asks for no image."""
    own, logger = threading.get_ident(), logging.getLogger("foveate")

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != own

    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)
