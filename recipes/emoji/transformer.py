"""Trains the Infinity transformer on scenes.

A step quantises the latents anew with flipped bits, so that later scales learn to correct earlier mistakes (bitwise
self-correction). Most steps see the first scales only, which cost a fraction.
Axes: B scenes, L tokens of all scales, T text tokens, E text width, Z bits.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from foveate.core.schedule import ScaleSchedule
from foveate.core.transfer import to_device
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.bsq import Quantised, quantise
from recipes.emoji.loop import Limits, Optimisation, Run, flops_of, steps
from recipes.emoji.teacher import PaddedTexts, Teacher, pad_texts
from recipes.emoji.window import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A kind of step: the first `scales` scales of `times` as many examples as the batch, in `share` of the steps."""

    scales: int
    share: float
    times: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerRecipe:
    """The transformer's shape, its schedule and how it is trained.

    `flip_rate` is the largest share of flipped bits. What an image shows is decided on the first scales, which cost a
    fraction of the last: `lengths` says how many examples stop after which scale; the shares add up to 1, and the last
    one runs all scales. A token of a scale with n tokens weighs n ** -`scale_power`. Of all texts `altered_share` are
    made harder: they lose some of their tokens, never the sentence embedding, and get noise of at most `text_noise`
    times the root mean square of each token. Texts are padded or cut to `text_length` tokens. The examples are a
    `window` of scenes, each used `uses` times on average. Compiling the blocks takes a minute and pays after three.
    """

    shape: InfinityConfig
    schedule: ScaleSchedule
    optimisation: Optimisation
    lengths: tuple[Length, ...]
    flip_rate: float = 0.25
    scale_power: float = 0.5
    unconditional_share: float = 0.1
    altered_share: float = 0.5
    text_noise: float = 0.7
    masked_tokens: int = 128
    text_length: int = 32
    window: int = 4096
    uses: float = 4.0
    compiles: bool = True
    dtype: str = "bfloat16"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Checks the lengths.

        Raises:
            FoveateError: If they leave out the last scale, or the shares are not those of a whole.
        """
        scales = [length.scales for length in self.lengths]
        if sorted(set(scales)) != scales or scales[-1:] != [len(self.schedule)] or scales[0] < 2:
            raise FoveateError(f"lengths must rise from 2 or more scales to all {len(self.schedule)}, got {scales}")
        shares = [length.share for length in self.lengths]
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise FoveateError(f"the shares of lengths must be positive and add up to 1, got {shares}")

    @property
    def examples_per_step(self) -> float:
        """Mean number of examples of a step."""
        return self.optimisation.batch * sum(length.times * length.share for length in self.lengths)

    def length_of(self, rng: np.random.Generator) -> Length:
        """Draws the length of a step."""
        ends = np.cumsum([length.share for length in self.lengths])
        return self.lengths[min(int(np.searchsorted(ends, rng.random(), side="right")), len(ends) - 1)]


def bit_loss(logits_BLV: Float[Tensor, "B L V"], quantised: Quantised, scale_power: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy per bit: the weighted mean that is trained, and the plain mean of each scale."""
    target_BLZ = torch.cat([bits.flatten(1, 2) for bits in quantised.bits], dim=1)
    margin_BLZ = logits_BLV.unflatten(-1, (-1, 2)).diff(dim=-1).squeeze(-1)
    loss_L = F.binary_cross_entropy_with_logits(margin_BLZ, target_BLZ.float(), reduction="none").mean((0, 2))
    counts = [bits.shape[1] * bits.shape[2] for bits in quantised.bits]
    weight_L = torch.cat([torch.full((n,), n**-scale_power) for n in counts]).to(loss_L)
    per_scale = torch.stack([part.mean() for part in loss_L.split(counts)])
    return (loss_L * weight_L).sum() / weight_L.sum(), per_scale.detach()


def _batch(recipe: TransformerRecipe, window: Window, model: Infinity, step: int) -> tuple[PaddedTexts, Quantised]:
    """Texts, bits and their flips, and the number of scales of one step; everything follows from the step's number."""
    rng = np.random.default_rng([recipe.optimisation.seed, step])
    length = recipe.length_of(rng)
    progress = step * recipe.examples_per_step / recipe.uses
    latents_BZHW, texts = window.batch(progress, length.times * recipe.optimisation.batch, rng)
    for row, text_TE in enumerate(texts):
        if rng.random() < recipe.altered_share:
            text_TE = alter_text(text_TE, recipe.text_noise, rng)  # noqa: PLW2901 - the text that is taught
        is_unconditional = rng.random() < recipe.unconditional_share
        texts[row] = model.unconditional(text_TE.shape[0]) if is_unconditional else text_TE
    drawn_B = torch.from_numpy(rng.uniform(0, recipe.flip_rate, len(texts))).float()
    flips_B = to_device(drawn_B, latents_BZHW.device)
    generator = torch.Generator(recipe.device).manual_seed(int(rng.integers(2**62)))
    with torch.no_grad():
        quantised = quantise(latents_BZHW, recipe.schedule.grids, flips_B, generator)
    return pad_texts(texts, recipe.text_length), Quantised(
        bits=quantised.bits[: length.scales],
        inputs=quantised.inputs[: length.scales - 1],
        f_hat_BZHW=quantised.f_hat_BZHW,
    )


def alter_text(text_TE: Float[Tensor, "T E"], noise: float, rng: np.random.Generator) -> Float[Tensor, "_ E"]:
    """Drops a random share of the tokens behind the first and adds noise, so that similar texts give the same image."""
    share = rng.random()
    kept = [0, *(t for t in range(1, text_TE.shape[0]) if rng.random() >= share)]
    text_TE = text_TE[kept]
    drawn_TE = torch.from_numpy(rng.standard_normal(text_TE.shape, dtype=np.float32))
    drawn_TE = to_device(drawn_TE, text_TE.device, text_TE.dtype)
    return text_TE + drawn_TE * (noise * rng.random() * text_TE.square().mean(1, keepdim=True).sqrt())


def train_transformer(
    recipe: TransformerRecipe,
    window: Window,
    checkpoint: Path,
    log: Callable[[str], None],
    preview: Callable[[dict[str, Tensor]], None] | None = None,
    preview_every_s: float = 900.0,
    initial: Mapping[str, Tensor] | None = None,
    limits: Limits | None = None,
) -> dict[str, Tensor]:
    """Trains until the recipe's minutes are used up, resuming from `checkpoint` if it exists.

    Args:
        recipe: Shape, schedule, optimisation.
        window: What to learn.
        checkpoint: Where the state of the run lives.
        log: Receives one line every two minutes of training.
        preview: Called with the averaged weights now and then, to draw a sample sheet.
        preview_every_s: Seconds of training between previews.
        initial: Weights to start from; a checkpoint goes before them.
        limits: When to pause; never if None.

    Returns:
        The averaged weights, float32.
    """
    torch.manual_seed(recipe.optimisation.seed)
    model = Infinity(recipe.shape).to(recipe.device)
    init_weights(model)
    small_start(model)
    if initial is not None:
        model.load_state_dict(initial)
    run = Run.start(model, recipe.optimisation)
    teacher = Teacher(
        model=model,
        schedule=recipe.schedule,
        masked_tokens=recipe.masked_tokens,
        dtype=getattr(torch, recipe.dtype),
    )
    step_flops: dict[int, int] = {}
    running = teacher.compiled() if recipe.compiles else teacher
    previewed_s = math.inf
    for step in steps(run, recipe.optimisation, checkpoint, log, limits or Limits()):
        began = time.perf_counter()
        texts, quantised = _batch(recipe, window, model, step)
        run.note(input_ms=1e3 * (time.perf_counter() - began))
        num_scales = len(quantised.bits)
        if num_scales not in step_flops:
            step_flops[num_scales] = 3 * flops_of(partial(teacher.logits, texts, quantised.inputs))
        logits = running.logits(texts, quantised.inputs)
        loss, per_scale = bit_loss(logits, quantised, recipe.scale_power)
        run.update(loss, recipe.optimisation)
        run.flops += step_flops[num_scales]
        run.samples += len(logits)
        run.note(coarse=per_scale[: recipe.lengths[0].scales].mean())
        if num_scales == len(recipe.schedule):
            run.note(loss=loss.detach(), last=per_scale[-1])
        # Only now is the clock that of the checkpoint.
        previewed_s = min(previewed_s, run.clock_s)
        if preview is not None and run.clock_s - previewed_s > preview_every_s:
            previewed_s = math.inf
            preview(run.average)
    return run.average


def small_start(model: Infinity) -> None:
    """Initialises as deep transformers like it: truncated normals, small outputs of sublayers, a near-zero head."""
    width, depth = model.config.width, model.config.depth
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "cfg_uncond" not in name:
            torch.nn.init.trunc_normal_(parameter, std=(1 / width / 3) ** 0.5)
        elif name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        for index in range(depth):
            block = model.block(index)
            for output in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                output.weight.div_((2 * depth) ** 0.5)
            block.ada_gss[:, :, 2:].mul_(0.1)
            block.ada_gss[:, :, :2].fill_(1.0)
        model.shared_ada_lin[1].weight.mul_(0.1)  # type: ignore[operator]
        model.head_nm.ada_lin[1].weight.mul_(0.1)  # type: ignore[operator]
        model.head.weight.mul_(0.1)
