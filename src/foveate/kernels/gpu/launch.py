"""Whether the Triton kernels run, and how they are launched: fixed settings per width, nothing is tried at run time.

They have never run on a device, so they are opt-in (`enabled`). At its first use with a shape and dtype each one is
compared with plain torch on the same inputs; one that fails or disagrees is not used again.
With `TRITON_INTERPRET=1` triton computes them on the CPU, slowly: that is how they are tested.
A launcher makes the device of its tensors the current one, which is where triton launches.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from foveate.core.warnings import CallWarning

logger = logging.getLogger("foveate")

T = TypeVar("T", bound=Tensor | tuple[Tensor, ...])

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-9}
"""Largest difference between a kernel and plain torch, over the largest value of the latter where that is above 1."""
SHARE_OF_BITS = 1e-3
"""Most bits of one call that may differ: a draw within float error of a probability falls either way."""

_WARPS = ((512, 2), (1024, 4))
"""Warps of a program by the values that it holds: 8 or 16 per thread, so that a thread loads 16 bytes at once."""
_MOST_WARPS = 8

Key = tuple[object, ...]
"""A kernel, and dtypes and widths of its inputs: what it is compiled for."""

_is_enabled: ContextVar[bool] = ContextVar("foveate_triton", default=False)
_checked: dict[Key, str | None] = {}
"""What the first use found, once per process: None where kernel and plain torch agree, else what was wrong."""


@contextmanager
def enabled(is_enabled: bool) -> Iterator[None]:
    """Lets the kernels run inside, in this thread, where `is_enabled`."""
    token = _is_enabled.set(is_enabled)
    try:
        yield
    finally:
        _is_enabled.reset(token)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels were asked for and can run for these tensors: on a GPU, and no gradients wanted."""
    if not _is_enabled.get() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(t.is_cuda or (_interprets() and t.device.type == "cpu") for t in tensors)


def run(name: str, kernel: Callable[..., T], twin: Callable[..., T], *arguments: object) -> T:
    """Runs a kernel, or its twin where the first use has shown that the kernel fails or disagrees.

    The first use for some dtypes and widths runs both, on copies, and waits for the device.

    Args:
        name: Of the kernel, for the warning.
        kernel: May change its arguments in place; returns what it computed or changed.
        twin: The same in plain torch.
        *arguments: Of both.
    """
    key = (name, *((a.dtype, a.shape[-1]) for a in arguments if isinstance(a, Tensor)))
    if key not in _checked:
        first = next(a for a in arguments if isinstance(a, Tensor))
        if not first.numel():
            return twin(*arguments)
        _checked[key] = _difference(kernel, twin, arguments)
        if _checked[key] is not None:
            logger.warning("%s", _message(name, _checked[key]))
    return kernel(*arguments) if _checked[key] is None else twin(*arguments)


def warnings() -> tuple[CallWarning, ...]:
    """What the report of a call says of kernels that are left alone."""
    found = {str(key[0]): reason for key, reason in _checked.items() if reason is not None}
    return tuple(CallWarning(code="kernels_plain", message=_message(name, said)) for name, said in found.items())


def kernel(name: str) -> ModuleType:
    """One of the files beside this one, imported when it is first asked for."""
    return importlib.import_module(f"foveate.kernels.gpu.{name}")


def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def num_warps(num_values: int) -> int:
    """Warps of a program that holds so many values, a power of two."""
    return next((warps for values, warps in _WARPS if num_values <= values), _MOST_WARPS)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`: blocks of a kernel have such sizes, and masks the rest."""
    return 1 << max(size - 1, 0).bit_length()


def _message(name: str, reason: str | None) -> str:
    return f"plain torch runs in place of the Triton kernel {name!r}: {reason}"


def _difference(kernel: Callable[..., T], twin: Callable[..., T], arguments: tuple[object, ...]) -> str | None:
    """The fault of a kernel on these inputs, None if it agrees; the inputs stay as they are."""
    expected = _parts(twin(*_copies(arguments)))
    try:
        found = _parts(kernel(*_copies(arguments)))
        worst = max(_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    except Exception as error:  # compilers and drivers have errors of their own
        return f"it failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
    return None if worst <= 1 else f"it differs from plain torch by {worst:.1e} times the tolerance"


def _parts(outcome: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outcome if isinstance(outcome, tuple) else (outcome,)


def _copies(arguments: tuple[object, ...]) -> list[object]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def _error(found: Tensor, expected: Tensor) -> float:
    """The difference over what is allowed; infinite for another shape or dtype, or numbers broken on one side."""
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((found != expected).double().mean()) / SHARE_OF_BITS
    is_broken = ~expected.isfinite()
    if not torch.equal(~found.isfinite(), is_broken):
        return float("inf")
    wide, ours = (part.double().masked_fill(is_broken, 0.0) for part in (expected, found))
    return float((ours - wide).abs().max() / wide.abs().max().clamp_min(1.0)) / TOLERANCES[expected.dtype]


@functools.cache
def _interprets() -> bool:
    """Whether triton computes on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
