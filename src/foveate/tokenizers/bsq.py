"""Binary spherical quantisation over several scales: latents to bits and back.

A code of d bits is a corner of a cube on the unit sphere: bit 1 is +1/sqrt(d), bit 0 is -1/sqrt(d).
Axes: B images, Z = d latent channels, (h, w) the grid of a scale, (H, W) the last grid.
Source: Infinity (arXiv 2412.04431), section 3.2, and BSQ (arXiv 2406.07548).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.tokenizers.accumulate import resize, shrink
from foveate.tokenizers.autoencoder import Autoencoder


def bits_to_codes(bits_BhwZ: Bool[Tensor, "B h w Z"]) -> Float[Tensor, "B Z h w"]:
    """Looks up the float32 codes of bits, channels first."""
    scale = bits_BhwZ.shape[-1] ** -0.5
    codes_BhwZ = torch.full_like(bits_BhwZ, -scale, dtype=torch.float32).masked_fill_(bits_BhwZ, scale)
    return codes_BhwZ.permute(0, 3, 1, 2).contiguous()


def codes_to_bits(codes_BZhw: Float[Tensor, "B Z h w"]) -> Bool[Tensor, "B h w Z"]:
    """Undoes `bits_to_codes`; any positive value counts as bit 1."""
    return codes_BZhw.permute(0, 2, 3, 1) > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantised:
    """Bits of every scale, what the transformer reads before each scale s > 0, and the latent they add up to."""

    bits: tuple[Bool[Tensor, "B _h _w Z"], ...]
    inputs: tuple[Float[Tensor, "B Z _h _w"], ...]
    f_hat_BZHW: Float[Tensor, "B Z H W"]


def quantise(
    latent_BZHW: Float[Tensor, "B Z H W"],
    grids: Sequence[Grid],
    flip_rate_B: Float[Tensor, " B"] | None = None,
    generator: torch.Generator | None = None,
) -> Quantised:
    """Quantises a latent scale by scale, each scale correcting what the earlier ones left over.

    Args:
        latent_BZHW: The encoder's output, on the last grid.
        grids: The schedule, coarse to fine.
        flip_rate_B: Share of bits to flip in what is added up, per image; `bits` holds the labels before the flip.
            Later scales then learn to correct the flips (bitwise self-correction, arXiv 2412.04431, section 3.3).
        generator: Draws the flips.

    Returns:
        Labels, inputs and the latent with the flips in it.
    """
    f_hat_BZHW = torch.zeros_like(latent_BZHW)
    last = (latent_BZHW.shape[-2], latent_BZHW.shape[-1])
    bits: list[Tensor] = []
    inputs: list[Tensor] = []
    for s, grid in enumerate(grids):
        if s > 0:
            inputs.append(resize(f_hat_BZHW, grid))
        bits_BhwZ = codes_to_bits(shrink(latent_BZHW - f_hat_BZHW, grid))
        bits.append(bits_BhwZ)
        if flip_rate_B is not None:
            draw_BhwZ = torch.rand(bits_BhwZ.shape, generator=generator, dtype=torch.float32, device=latent_BZHW.device)
            bits_BhwZ = bits_BhwZ ^ (draw_BhwZ < flip_rate_B[:, None, None, None])
        f_hat_BZHW = f_hat_BZHW + resize(bits_to_codes(bits_BhwZ).to(f_hat_BZHW.dtype), last)
    return Quantised(bits=tuple(bits), inputs=tuple(inputs), f_hat_BZHW=f_hat_BZHW)


class BSQTokenizer:
    """The tokenizer of the Infinity family: an autoencoder and its bits.

    With `patch` = 2 a token holds the bits of 2x2 latents (spatial patchify, as in Infinity-8B).
    """

    def __init__(self, autoencoder: Autoencoder, patch: int = 1) -> None:
        self.autoencoder = autoencoder
        self.patch = patch
        self.latent_channels = autoencoder.config.latent_channels

    @property
    def stride(self) -> int:
        """Pixels along a side of a token."""
        return self.autoencoder.config.stride * self.patch

    def symbols(self, logits_nV: Float[Tensor, "n v"]) -> Float[Tensor, "n d 2"]:
        """Two logits per bit."""
        return logits_nV.unflatten(-1, (-1, 2))

    def next_input(self, f_hat_BZHW: Float[Tensor, "B Z H W"], grid: Grid) -> Float[Tensor, "B z h w"]:
        """The latent resized to a scale; 2x2 latents side by side in the channels where a token holds them."""
        small = resize(f_hat_BZHW, (grid[0] * self.patch, grid[1] * self.patch))
        return F.pixel_unshuffle(small, self.patch) if self.patch > 1 else small

    def residual(
        self, symbols_Bld: Int[Tensor, "B l d"] | Float[Tensor, "B l d"], grid: Grid
    ) -> Float[Tensor, "B Z y x"]:
        """Codes of all tokens on the latent grid.

        Args:
            symbols_Bld: Bits, or shares of bit 1 that mix both values (soft symbols); the dtype decides.
            grid: Of the scale.
        """
        bits_Bdhw = symbols_Bld.transpose(1, 2).unflatten(-1, grid)
        bits_Bdhw = F.pixel_shuffle(bits_Bdhw, self.patch) if self.patch > 1 else bits_Bdhw
        if symbols_Bld.is_floating_point():
            return (2 * bits_Bdhw.float() - 1) * self.latent_channels**-0.5
        return bits_to_codes(bits_Bdhw.permute(0, 2, 3, 1) > 0)

    def add(
        self, f_hat_BZHW: Float[Tensor, "B Z H W"], residual_BZyx: Float[Tensor, "B Z y x"], scale: int, num_scales: int
    ) -> Float[Tensor, "B Z H W"]:
        """Adds the residual, enlarged to the last grid."""
        return f_hat_BZHW + resize(residual_BZyx, (f_hat_BZHW.shape[-2], f_hat_BZHW.shape[-1]))

    def decode(self, f_hat_BZHW: Float[Tensor, "B Z H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Pixels, clamped to [-1, 1]; an image does not depend on its batch mates."""
        return self.autoencoder.images(f_hat_BZHW)
