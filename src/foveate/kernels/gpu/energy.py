"""Squared Haar detail of 2x2 patches and its average over 3x3 of them, in one pass (LD-Pruning, Eqs. 7-10); float64.

Every patch is computed up to nine times: the map of a scale is small enough to stay in the cache, and nothing in
between is written.
Axes: B images, Z latent channels, (h, w) the grid, (y, x) half of it, rounded up.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_BLOCK = 128
"""Patches of a program, on 4 warps."""


@triton.jit
def _patch_energy(map_ptr, y, x, num_channels, height, width, is_inside):
    """Detail of the patches (y, x), summed over channels; odd grids reflect, a single row or column repeats."""
    top, left = 2 * y, 2 * x
    bottom = tl.where(top + 1 < height, top + 1, tl.maximum(height - 2, 0))
    right = tl.where(left + 1 < width, left + 1, tl.maximum(width - 2, 0))
    total = tl.zeros_like(y).to(tl.float64)
    for channel in range(num_channels):
        plane = map_ptr + channel * height * width
        a = tl.load(plane + top * width + left, mask=is_inside, other=0.0).to(tl.float64)
        b = tl.load(plane + top * width + right, mask=is_inside, other=0.0).to(tl.float64)
        c = tl.load(plane + bottom * width + left, mask=is_inside, other=0.0).to(tl.float64)
        d = tl.load(plane + bottom * width + right, mask=is_inside, other=0.0).to(tl.float64)
        horizontal, vertical, diagonal = (b - a + d - c) * 0.5, (c - a + d - b) * 0.5, (b - a + c - d) * 0.5
        total += horizontal * horizontal + vertical * vertical + diagonal * diagonal
    return total


@triton.jit
def _smooth_energy(map_ptr, out_ptr, num_channels, height, width, num_y, num_x, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_patch = patch < num_y * num_x
    y, x = patch // num_x, patch % num_x
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    count = tl.zeros((BLOCK,), dtype=tl.float64)
    for neighbour in range(9):
        near_y, near_x = y + neighbour // 3 - 1, x + neighbour % 3 - 1
        is_near = is_patch & (near_y >= 0) & (near_y < num_y) & (near_x >= 0) & (near_x < num_x)
        of_image = map_ptr + image * num_channels * height * width
        energy = _patch_energy(of_image, near_y, near_x, num_channels, height, width, is_near)
        total += tl.where(is_near, energy, 0.0)
        count += tl.where(is_near, 1.0, 0.0)
    tl.store(out_ptr + image * num_y * num_x + patch, total / tl.maximum(count, 1.0), mask=is_patch)


def smooth_energy(residual_BZhw: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B y x"]:
    """As `policies.ld_pruning.smooth_energy`."""
    residual_BZhw = residual_BZhw.contiguous()
    num_images, num_channels, height, width = residual_BZhw.shape
    num_y, num_x = (height + 1) // 2, (width + 1) // 2
    out_Byx = residual_BZhw.new_empty((num_images, num_y, num_x), dtype=torch.float64)
    with torch.cuda.device_of(residual_BZhw):
        _smooth_energy[(triton.cdiv(num_y * num_x, _BLOCK), num_images)](
            residual_BZhw, out_Byx, num_channels, height, width, num_y, num_x, BLOCK=_BLOCK, num_warps=4
        )
    return out_Byx
