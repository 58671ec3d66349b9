"""FLOP/s of one dense matmul and bytes/s of reading weights on this machine, both measured.

Axes: M rows and columns of a square matrix.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from foveate.kernels.linear import linear

MATMUL_SIZES = (512, 1024, 2048, 4096, 8192)
"""Squares that are tried, in this order, as long as they are quick enough."""

BANDWIDTH_SIZE = 8192
"""Rows of the matrix that is read: 256 MiB in float32, more than most caches hold."""

_BUDGET_MS = 1000.0
"""For the repeats of one size; a size that would not fit into it is left out."""
_MIN_REPEATS, _MAX_REPEATS = 3, 50


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulPeak:
    """The best rate over all sizes that were tried, and the size (M) that reached it."""

    flops_per_s: float
    size: int
    tried: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "flops_per_s": self.flops_per_s,
            "size": self.size,
            "tried": list(self.tried),
            "dtype": self.dtype,
        }


def matmul_peak(dtype: torch.dtype, device: torch.device, sizes: Sequence[int] = MATMUL_SIZES) -> MatmulPeak:
    """Multiplies square matrices and takes the best rate of torch and of the model's own linear layer.

    Larger sizes are left out once the next one would take more than a second. Waits for the device.

    Args:
        dtype: Of both matrices and of the product.
        device: Where.
        sizes: Rows and columns, growing; the first is always measured.
    """
    rates: dict[int, float] = {}
    for size in sizes:
        a_MM, b_MM = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
        ms = min(_best_ms(partial(multiply, a_MM, b_MM), device) for multiply in (torch.matmul, linear))
        rates[size] = 2 * size**3 / (ms / 1e3)
        if 8 * ms > _BUDGET_MS:
            break
    best = max(rates, key=rates.__getitem__)
    return MatmulPeak(flops_per_s=rates[best], size=best, tried=tuple(rates), dtype=str(dtype).removeprefix("torch."))


def weight_bandwidth(dtype: torch.dtype, device: torch.device, size: int = BANDWIDTH_SIZE) -> float:
    """Bytes of weights per second that a linear layer reads for one token; the best of some repeats.

    Args:
        dtype: Of the weights.
        device: Where.
        size: Inputs and outputs of the layer.
    """
    weight_MM = torch.ones(size, size, dtype=dtype, device=device)
    x_1M = torch.ones(1, size, dtype=dtype, device=device)
    ms = _best_ms(partial(linear, x_1M, weight_MM), device)
    return weight_MM.numel() * weight_MM.element_size() / (ms / 1e3)


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _best_ms(work: Callable[[], object], device: torch.device) -> float:
    """Shortest time of some repeats, after one that is not counted: a peak, so no median."""
    work()
    synchronise(device)
    times: list[float] = []
    while len(times) < _MIN_REPEATS or (len(times) < _MAX_REPEATS and sum(times) < _BUDGET_MS):
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - began))
    return max(min(times), 1e-6)
