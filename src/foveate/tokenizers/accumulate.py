"""How the residuals of the scales add up to the latent `f_hat`, and what the next scale reads from it.

`f_hat` has the last grid of the schedule (H, W); the residual of scale s has the scale's own grid (h, w).
Source: Infinity (arXiv 2412.04431), whose trilinear interpolation over one frame equals the 2-D bilinear one.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.schedule import Grid


def resize(map_BZhw: Float[Tensor, "B Z h w"], grid: Grid) -> Float[Tensor, "B Z y x"]:
    """Resizes a map bilinearly (`align_corners=False`, no antialiasing); the same map when nothing changes."""
    if tuple(map_BZhw.shape[-2:]) == grid:
        return map_BZhw
    return F.interpolate(map_BZhw, size=grid, mode="bilinear", align_corners=False)


def shrink(map_BZhw: Float[Tensor, "B Z h w"], grid: Grid) -> Float[Tensor, "B Z y x"]:
    """Averages a map down to a coarser grid, as the encoder does before it quantises a scale."""
    if tuple(map_BZhw.shape[-2:]) == grid:
        return map_BZhw
    return F.interpolate(map_BZhw, size=grid, mode="area")
