"""Windows of the fine scales: most of the tokens of an example are on its last scales, and much alike.

A step may run the first scales whole and of every finer one the same window of half the height and width: a quarter of
the tokens, so several times as many examples in the same time.
Axes: B images, Z bits of a token, (h, w) the grid of a scale.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.tokenizers.bsq import Quantised

PLACES = 5
"""Places of a window along a side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """The first `whole` scales, and a window of each finer one; `y` and `x` in [0, 1] are its place along the sides."""

    whole: int
    y: float
    x: float

    @classmethod
    def drawn(cls, whole: int, rng: np.random.Generator) -> "Crop":
        """Draws a place."""
        y, x = rng.integers(0, PLACES, 2).tolist()
        return cls(whole=whole, y=y / (PLACES - 1), x=x / (PLACES - 1))

    def window(self, scale: int, grid: Grid) -> tuple[slice, slice]:
        """Rows and columns of a scale that run."""
        if scale < self.whole:
            return slice(0, grid[0]), slice(0, grid[1])
        return _half(grid[0], self.y), _half(grid[1], self.x)

    def of(self, quantised: Quantised) -> Quantised:
        """Bits and inputs of the tokens that run; the latent stays whole."""
        bits, inputs = [], []
        for scale, bits_BhwZ in enumerate(quantised.bits):
            rows, columns = self.window(scale, (bits_BhwZ.shape[1], bits_BhwZ.shape[2]))
            bits.append(bits_BhwZ[:, rows, columns])
            if scale > 0:
                inputs.append(quantised.inputs[scale - 1][:, :, rows, columns])
        return Quantised(bits=tuple(bits), inputs=tuple(inputs), f_hat_BZHW=quantised.f_hat_BZHW)

    def of_tokens(self, scale: int, grid: Grid, values_lD: Shaped[Tensor, "l D"]) -> Shaped[Tensor, "_ D"]:
        """What belongs to the tokens of a scale that run."""
        rows, columns = self.window(scale, grid)
        return values_lD.unflatten(0, grid)[rows, columns].flatten(0, 1)


def _half(length: int, place: float) -> slice:
    size = (length + 1) // 2
    begin = round(place * (length - size))
    return slice(begin, begin + size)
