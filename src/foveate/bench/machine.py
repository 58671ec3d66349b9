"""This machine as plain data: versions, processor, devices; never a name of a host or of a user."""

import os
import platform
from typing import Any

import torch

from foveate.core.version import __version__
from foveate.kernels import native
from foveate.pipeline.output import installed_version, processor_name

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "triton", "pillow", "torchmetrics")


def describe_machine() -> dict[str, Any]:
    """Versions, processor, how torch was built, and devices."""
    return {
        "versions": {
            "foveate": __version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "cpu": {
            "name": processor_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "has_bf16_instructions": _has_bf16(),
            "kernels": native.describe(),
        },
        "torch_build": {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "has_mkldnn": torch.backends.mkldnn.is_available(),
        },
        "devices": _devices(),
    }


def _has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; torch also computes without, but slowly."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def _devices() -> list[str]:
    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return ["cpu", *names]
