"""Vector quantisation over several scales: latents to ids and back.

A code is a row of the codebook, its id the row's number. What a scale adds to the latent is its codes, enlarged to the
last grid and refined by a convolution: phi(h) = (h + conv(h)) / 2, one of a few that the scales share.
Axes: B images, l tokens of a scale, V codes, Z latent channels, (h, w) the grid of a scale, (H, W) the last grid.
Source: VAR (arXiv 2404.02905), section 3.2, and its published tokenizer; everything but `decode` is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.schedule import Grid
from foveate.tokenizers.accumulate import shrink
from foveate.tokenizers.autoencoder import Autoencoder

_REFINERS: dict[tuple[int, int], tuple[int, ...]] = {
    (10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    (14, 4): (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}
"""Convolution of each scale by (scales, convolutions). Two of the ten scales lie exactly between two convolutions; the
published models were trained with how float64 rounds them, which must not depend on the machine."""


def refiner_index(scale: int, num_scales: int, num_refiners: int) -> int:
    """Which convolution refines a scale: the nearest of evenly spread ticks to scale / (num_scales - 1)."""
    table = _REFINERS.get((num_scales, num_refiners))
    if table is not None:
        return table[scale]
    # The margin of the published four is a third of their distance, that of any other number a half.
    margin = 1 / 3 / num_refiners if num_refiners == 4 else 1 / 2 / num_refiners  # noqa: PLR2004
    ticks = np.linspace(margin, 1 - margin, num_refiners)
    return int(np.argmin(np.abs(ticks - scale / max(num_scales - 1, 1))))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedIds:
    """Ids of every scale, and the latent that they add up to."""

    ids: tuple[Int[Tensor, "B _l 1"], ...]
    f_hat_BZHW: Float[Tensor, "B Z H W"]


class VQTokenizer:
    """The tokenizer of the VAR family: an autoencoder and its codebook."""

    def __init__(self, autoencoder: Autoencoder, *, refines_last: bool = True) -> None:
        """Stores the autoencoder.

        Args:
            autoencoder: With a codebook.
            refines_last: Whether a convolution refines the last scale too; HART adds it as it is.
        """
        self.autoencoder, self.refines_last = autoencoder, refines_last
        self.latent_channels = autoencoder.config.latent_channels

    @property
    def stride(self) -> int:
        """Pixels along a side of a token."""
        return self.autoencoder.config.stride

    def _codebook(self) -> Float[Tensor, "V Z"]:
        return self.autoencoder.quantize.embedding.weight.float()

    def symbols(self, logits_nV: Float[Tensor, "n V"]) -> Float[Tensor, "n 1 V"]:
        """One id per token."""
        return logits_nV.unsqueeze(1)

    def next_input(self, f_hat_BZHW: Float[Tensor, "B Z H W"], grid: Grid) -> Float[Tensor, "B Z h w"]:
        """The latent averaged down to a scale."""
        return shrink(f_hat_BZHW, grid)

    def residual(self, symbols: Int[Tensor, "B l 1"] | Float[Tensor, "B l V"], grid: Grid) -> Float[Tensor, "B Z h w"]:
        """Codes of all tokens on their grid.

        Args:
            symbols: Ids, or weights of all codes that mix them (soft symbols); the dtype decides.
            grid: Of the scale.
        """
        return self.codes(symbols).transpose(1, 2).unflatten(-1, grid)

    def codes(self, symbols: Int[Tensor, "*b l 1"] | Float[Tensor, "*b l V"]) -> Float[Tensor, "*b l Z"]:
        """Rows of the codebook, or mixtures of them; as `residual` reads symbols."""
        if symbols.is_floating_point():
            return symbols.float() @ self._codebook()
        return F.embedding(symbols.squeeze(-1), self._codebook())

    def add(
        self, f_hat_BZHW: Float[Tensor, "B Z H W"], residual_BZhw: Float[Tensor, "B Z h w"], scale: int, num_scales: int
    ) -> Float[Tensor, "B Z H W"]:
        """Adds the residual, enlarged to the last grid and refined."""
        if scale == num_scales - 1 and not self.refines_last:
            return f_hat_BZHW + residual_BZhw
        last = (f_hat_BZHW.shape[-2], f_hat_BZHW.shape[-1])
        large_BZHW = residual_BZhw
        if residual_BZhw.shape[-2:] != last:
            large_BZHW = F.interpolate(residual_BZhw, size=last, mode="bicubic", align_corners=False)
        quantiser = self.autoencoder.quantize
        weight, bias = quantiser.refiner(refiner_index(scale, num_scales, self.autoencoder.config.num_refiners))
        refined_BZHW = F.conv2d(large_BZHW, weight.float(), bias.float(), padding=1)
        return f_hat_BZHW + (0.5 * large_BZHW + 0.5 * refined_BZHW)

    def quantise(self, latent_BZHW: Float[Tensor, "B Z H W"], grids: Sequence[Grid]) -> QuantisedIds:
        """Quantises a latent scale by scale, each scale correcting what the earlier ones left over.

        Args:
            latent_BZHW: The encoder's output, on the last grid.
            grids: The schedule, coarse to fine.

        Returns:
            The nearest codes of each scale, by Euclidean distance to what is left over, averaged down to its grid.

        Raises:
            FoveateError: The latent is not on the last grid.
        """
        if tuple(latent_BZHW.shape[-2:]) != tuple(grids[-1]):
            raise FoveateError(f"the latent must be on the last grid {grids[-1]}, got {tuple(latent_BZHW.shape[-2:])}")
        latent_BZHW = latent_BZHW.float()
        f_hat_BZHW = torch.zeros_like(latent_BZHW)
        ids: list[Tensor] = []
        for s, grid in enumerate(grids):
            ids.append(self._nearest(shrink(latent_BZHW - f_hat_BZHW, grid)))
            f_hat_BZHW = self.add(f_hat_BZHW, self.residual(ids[-1], grid), s, len(grids))
        return QuantisedIds(ids=tuple(ids), f_hat_BZHW=f_hat_BZHW)

    def _nearest(self, map_BZhw: Float[Tensor, "B Z h w"]) -> Int[Tensor, "B l 1"]:
        """Ids of the nearest codes; the length of what is compared is the same for all codes and left out."""
        codebook_VZ = self._codebook()
        dots_BlV = map_BZhw.flatten(2).transpose(1, 2) @ codebook_VZ.T
        return (codebook_VZ.square().sum(-1) - 2 * dots_BlV).argmin(-1, keepdim=True)

    def decode(self, f_hat_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Pixels, clamped to [-1, 1]; an image does not depend on its batch mates."""
        return self.autoencoder.images(f_hat_BZHW)
