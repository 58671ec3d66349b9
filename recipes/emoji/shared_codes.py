"""A tokenizer whose first scales have the codes of an older, coarser one.

A transformer that was trained on the older one then knows the first scales of the new one already: only the finer ones
are left to learn. The older latents are what the new ones must average to on the older one's last grid.
Axes: B images, Z latent channels, (h, w) the older tokenizer's last grid, (H, W) that of the new one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.schedule import Grid
from foveate.tokenizers.accumulate import resize, shrink
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import quantise

BATCH = 8
REFINEMENTS = 6
"""Corrections after which enlarged latents average to what they came from, to a thousandth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedCodes:
    """The older tokenizer, and how strongly the new one is held to it.

    Attributes:
        autoencoder: The older one; it is not trained.
        grid: Its last grid.
        weight: Of the mean squared distance in the loss.
    """

    autoencoder: Autoencoder
    grid: Grid
    weight: float = 4.0

    def distance(
        self, latent_BZHW: Float[Tensor, "B Z H W"], pixels_B3YX: Float[Tensor, "B 3 Y X"]
    ) -> Float[Tensor, ""]:
        """Mean squared distance of the new latents, averaged down, to the older ones of the same pixels."""
        with torch.no_grad():
            older_BZhw = self.autoencoder.encode(pixels_B3YX).float()
        return (shrink(latent_BZHW, self.grid) - older_BZhw).square().mean()


def fit_codes(
    model: Autoencoder, codes: SharedCodes, pixels_B3YX: Float[Tensor, "B 3 Y X"], grids: tuple[Grid, ...]
) -> None:
    """Gives a trained tokenizer the older codes as far as its two convolutions next to the quantiser can, in place.

    The encoder's last one is fitted by least squares to the older latents with the model's own detail on them, the
    decoder's first one to what it read from the model's own latents. Training does the rest.
    """
    features: list[Tensor] = []
    hook = model.encoder.conv_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        own_BZHW = torch.cat([model.encode(part) for part in pixels_B3YX.split(BATCH)])
        older_BZhw = torch.cat([codes.autoencoder.encode(part) for part in pixels_B3YX.split(BATCH)])
    hook.remove()
    last, coarse = grids[-1], codes.grid
    wanted_BZHW = resize(older_BZhw, last) + own_BZHW - resize(shrink(own_BZHW, coarse), last)
    for _ in range(REFINEMENTS):
        wanted_BZHW = wanted_BZHW + resize(older_BZhw - shrink(wanted_BZHW, coarse), last)
    with torch.no_grad():
        read = torch.cat([model.decoder.conv_in(part) for part in own_BZHW.split(BATCH)])
        _fit(model.encoder.conv_out, torch.cat(features), wanted_BZHW)
        latents = torch.cat([model.encoder.conv_out(part) for part in features])
        _fit(model.decoder.conv_in, quantise(latents, grids).f_hat_BZHW, read)


def _fit(layer: nn.Conv2d, inputs: Float[Tensor, "B c H W"], outputs: Float[Tensor, "B d H W"]) -> None:
    """Least squares for a convolution of 3x3 with padding 1, with a ridge of a millionth."""
    size = inputs.shape[1] * 9 + 1
    squares, products = inputs.new_zeros(size, size), inputs.new_zeros(size, outputs.shape[1])
    for part, target in zip(inputs.split(BATCH), outputs.split(BATCH), strict=True):
        rows = F.unfold(part, 3, padding=1).transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        squares += rows.T @ rows
        products += rows.T @ target.flatten(2).transpose(1, 2).flatten(0, 1)
    squares = squares.double()
    squares.diagonal().add_(1e-6 * squares.diagonal().mean())
    solved = torch.linalg.solve(squares, products.double()).to(layer.weight)
    layer.weight.copy_(solved[:-1].T.reshape(layer.weight.shape))
    assert layer.bias is not None
    layer.bias.copy_(solved[-1])
