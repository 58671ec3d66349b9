"""Trains the BSQ autoencoder: the first of the two networks of the bundled model.

Loss per pixel: L1 + 2 L2, half an L1 on the gradients, and from the first step an L1 and L2 on the two chroma
differences; without the last one a short run spends its bits on luminance. Gradients pass the quantiser straight
through; on some steps the last one to three scales are left out, so that coarse sums decode well too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from foveate.core.layers import init_weights
from foveate.core.schedule import Grid
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig, ResBlock
from foveate.tokenizers.bsq import quantise
from recipes.emoji.loop import Limits, Optimisation, Run, flops_of, steps
from recipes.emoji.shared_codes import SharedCodes
from recipes.emoji.window import SceneSequence

PREVIEW_STEPS = 2000
"""Steps between two sample sheets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """The tokenizer's shape, its schedule and how it is trained.

    It must be finished before the transformer begins: one that learns on moves every code, and the transformer forgets
    what it can generate.
    """

    shape: AutoencoderConfig
    grids: tuple[Grid, ...]
    optimisation: Optimisation
    commitment: float = 0.25
    early_exit_share: float = 0.2
    dtype: str = "bfloat16"
    device: str = "cpu"


def composite(rgba: UInt8[np.ndarray, "n Y X 4"], background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """Lays straight-alpha drawings over a colour; float RGB in [-1, 1], (n, 3, Y, X)."""
    pixels = torch.from_numpy(rgba).float() / 255
    alpha = pixels[..., 3:]
    colour = torch.tensor(background).float() / 255
    flat = pixels[..., :3] * alpha + colour * (1 - alpha)
    return (flat * 2 - 1).permute(0, 3, 1, 2).contiguous()


def pixel_loss(out: Float[Tensor, "B 3 Y X"], target: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, ""]:
    """The reconstruction loss of the module docstring."""
    error = out - target
    loss = error.abs().mean() + 2 * error.square().mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    red_green = error[:, 0] - error[:, 1]
    blue_yellow = error[:, 2] - (error[:, 0] + error[:, 1]) / 2
    for chroma in (red_green, blue_yellow):
        loss = loss + 0.75 * chroma.abs().mean() + 1.5 * chroma.square().mean()
    return loss


def new_autoencoder(shape: AutoencoderConfig) -> Autoencoder:
    """Builds an autoencoder whose residual blocks begin as the identity."""
    model = Autoencoder(shape)
    init_weights(model)
    for module in model.modules():
        if isinstance(module, ResBlock):
            torch.nn.init.zeros_(module.conv2.weight)
    return model


def reconstruct(model: Autoencoder, pixels: Float[Tensor, "B 3 Y X"], grids: tuple[Grid, ...]) -> Tensor:
    """Encodes, quantises and decodes; pixels clamped to [-1, 1]."""
    with torch.no_grad():
        return model.decode(quantise(model.encode(pixels), grids).f_hat_BZHW).clamp(-1, 1)


def psnr_of(out: Tensor, target: Tensor) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio per image in dB, for pixels in [-1, 1]."""
    return 10 * torch.log10(4 / (out - target).square().flatten(1).mean(1))


def _loss(
    model: Autoencoder,
    target: Tensor,
    recipe: TokenizerRecipe,
    rng: np.random.Generator,
    codes: SharedCodes | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    grids = recipe.grids
    if rng.random() < recipe.early_exit_share:
        grids = grids[: -int(rng.integers(1, 4))]
    latent = model.encode(target).float()
    with torch.no_grad():
        f_hat = quantise(latent, grids).f_hat_BZHW
    commitment = (latent - f_hat).square().mean()
    out = model.decode(latent + (f_hat - latent).detach()).float()
    loss = pixel_loss(out, target)
    figures = {"loss": loss.detach(), "commitment": commitment.detach()}
    if grids == recipe.grids:
        figures["psnr"] = psnr_of(out.detach(), target).mean()
    loss = loss + recipe.commitment * commitment
    if codes is not None:
        distance = codes.distance(latent, target)
        figures["codes"] = distance.detach()
        loss = loss + codes.weight * distance
    return loss, figures


def train_tokenizer(
    recipe: TokenizerRecipe,
    sequence: SceneSequence,
    checkpoint: Path,
    log: Callable[[str], None],
    preview: Callable[[Autoencoder], None] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    limits: Limits | None = None,
    codes: SharedCodes | None = None,
) -> dict[str, Tensor]:
    """Trains until the recipe's minutes are used up, resuming from `checkpoint` if it exists.

    Args:
        recipe: Shape, schedule, optimisation.
        sequence: What to learn; every scene is seen once.
        checkpoint: Where the state of the run lives.
        log: Receives one line every two minutes of training.
        preview: Called with the averaged model now and then, to draw a sample sheet.
        initial: Weights to start from; a checkpoint goes before them.
        limits: When to pause; never if None.
        codes: Whose codes the first scales share; nobody's if None.

    Returns:
        The averaged weights, float32.
    """
    torch.manual_seed(recipe.optimisation.seed)
    model = new_autoencoder(recipe.shape).to(recipe.device)
    if initial is not None:
        model.load_state_dict(initial)
    run = Run.start(model, recipe.optimisation)
    dtype = getattr(torch, recipe.dtype)
    batch = recipe.optimisation.batch
    pixels = sequence.pixels(sequence.scenes(0, 1))
    step_flops = 3 * batch * flops_of(lambda: model.decode(model.encode(pixels)))
    for step in steps(run, recipe.optimisation, checkpoint, log, limits or Limits()):
        rng = np.random.default_rng([recipe.optimisation.seed, step])
        target = sequence.pixels(sequence.scenes(step * batch, batch))
        with torch.autocast(recipe.device, dtype, enabled=dtype != torch.float32):
            loss, figures = _loss(model, target, recipe, rng, codes)
        run.update(loss, recipe.optimisation)
        run.samples += batch
        run.flops += step_flops
        run.note(**figures)
        if preview is not None and (step + 1) % PREVIEW_STEPS == 0:
            preview(averaged(run, recipe.shape))
    return run.average


def averaged(run: Run, shape: AutoencoderConfig) -> Autoencoder:
    """The run's averaged weights in a model of their own."""
    model = Autoencoder(shape)
    model.load_state_dict(run.average)
    return model.eval()
