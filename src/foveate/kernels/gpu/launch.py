"""Whether the Triton kernels run, and how they are launched: fixed settings per width, nothing is tried at run time.

They run for tensors on an NVIDIA GPU where triton is installed and no gradients are wanted. `FOVEATE_TRITON=0` switches
them off. With `TRITON_INTERPRET=1` triton computes them on the CPU, slowly: that is how they are tested.
A launcher makes the device of its tensors the current one, which is where triton launches.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from foveate.kernels import switches

logger = logging.getLogger("foveate")

_WARPS = ((512, 2), (1024, 4))
"""Warps of a program by the values that it holds: 8 or 16 per thread, so that a thread loads 16 bytes at once."""
_MOST_WARPS = 8


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels run for these tensors."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(t.is_cuda or (_interprets() and t.device.type == "cpu") for t in tensors) and has_triton()


def kernel(name: str) -> ModuleType:
    """One of the files beside this one, imported when it is first asked for."""
    return importlib.import_module(f"foveate.kernels.gpu.{name}")


def num_warps(num_values: int) -> int:
    """Warps of a program that holds so many values, a power of two."""
    return next((warps for values, warps in _WARPS if num_values <= values), _MOST_WARPS)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`: blocks of a kernel have such sizes, and masks the rest."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def has_triton() -> bool:
    """Whether triton is there and wanted; says once, at WARNING, if it is missing."""
    if not switches.is_on("FOVEATE_TRITON"):
        return False
    if importlib.util.find_spec("triton") is None:
        logger.warning("the GPU runs plain torch, with several passes where one would do; install triton for kernels")
        return False
    return True


@functools.cache
def _interprets() -> bool:
    """Whether triton computes on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
