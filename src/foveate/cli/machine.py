"""This machine and what a model needs on it, as plain data."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from foveate.cli.registered import count_parameters, default_schedule, file_bytes
from foveate.core.guidance import GuidanceSchedule
from foveate.core.schedule import ScaleSchedule
from foveate.core.version import __version__
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request, bounds_of
from foveate.families import BUNDLED, DATA, SHAPES, ModelSpec, find_folder
from foveate.folder import CONFIG_NAME, read_config
from foveate.models.infinity import Infinity
from foveate.pipeline import DTYPES
from foveate.pipeline_output import processor_name
from foveate.policies.full import Full

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pillow", "torchmetrics")


def describe(model: str | None = None) -> dict[str, Any]:
    """Versions, processor, devices and bundled models; with a model also what it needs.

    Raises:
        FoveateError: There is no such model.
    """
    folders = [DATA / name for name in dict.fromkeys(BUNDLED.values())]
    found: dict[str, Any] = {
        "versions": {"foveate": __version__, "python": platform.python_version(), **_versions()},
        "cpu": {
            "name": processor_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "has_bf16_instructions": _has_bf16(),
        },
        "torch_build": {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "has_mkldnn": torch.backends.mkldnn.is_available(),
        },
        "devices": _devices(),
        "bundled_models": [str(folder) for folder in folders if (folder / CONFIG_NAME).is_file()],
    }
    return found if model is None else {**found, "model": needs(model)}


def needs(name: str) -> dict[str, Any]:
    """Bytes of the weights, and of keys and values at their bound, for one picture of the default size with guidance.

    The text encoder and what blocks hold for a moment come on top.

    Raises:
        FoveateError: There is no such model.
    """
    folder = None if name in SHAPES else find_folder(name)
    spec = SHAPES[name] if folder is None else ModelSpec.from_json(read_config(folder))
    schedule = default_schedule(spec)
    parameters = count_parameters(spec)
    height, width = schedule.grids[-1]
    return {
        "name": name,
        "size": [width * spec.stride, height * spec.stride],
        "tokens": schedule.num_tokens,
        "parameters": parameters,
        "file_bytes": None if folder is None else file_bytes(folder),
        "weight_bytes": {dtype: sum(parameters.values()) * kind.itemsize for dtype, kind in DTYPES.items()},
        "kv_bytes": {dtype: _kv_bytes(spec, schedule, kind.itemsize) for dtype, kind in DTYPES.items()},
    }


def _kv_bytes(spec: ModelSpec, schedule: ScaleSchedule, bytes_per_element: int) -> int:
    """Of the full policy."""
    with torch.device("meta"):
        shape = Infinity(spec.transformer).shape
        condition = torch.empty(spec.transformer.text_tokens, spec.transformer.text_width)
    count = len(schedule)
    request = Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(2.0,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=(0,)),
        conditions=(condition,),
        num_images=1,
    )
    bounds = bounds_of(Full().bind(schedule, shape), request, shape.num_blocks)
    return bounds.kv_bytes(shape.num_heads * shape.head_width, bytes_per_element)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; torch also computes without, but slowly."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def _devices() -> list[str]:
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *names]
