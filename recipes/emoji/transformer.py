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
from recipes.emoji.crops import Crop
from recipes.emoji.loop import Limits, Optimisation, Run, flops_of, steps
from recipes.emoji.teacher import PaddedTexts, Teacher, draw_paths, pad_texts
from recipes.emoji.window import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """A kind of step: the first `scales` scales of `times` as many examples as the batch, in `share` of the steps.

    `whole` scales run whole and of the finer ones a window, see `crops`; None runs all of them whole. `schedule` is
    that of another aspect ratio; None is the recipe's own.
    """

    scales: int
    share: float
    times: int = 1
    whole: int | None = None
    schedule: ScaleSchedule | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerRecipe:
    """The transformer's shape, its schedule and how it is trained.

    `flip_rate` is the largest share of flipped bits. What an image shows is decided on the first scales, which cost a
    fraction of the last: `lengths` says how many examples stop after which scale; the shares add up to 1, and the last
    one of each schedule runs all scales. In the first `coarse_share` of the minutes no step does, and the others take
    its place. `path_rate` is the stochastic depth of the last block, see `draw_paths`. A token of a scale with n tokens
    weighs n ** -`scale_power`. Of all texts `altered_share` are made harder: they lose some of their tokens, never the
    sentence embedding, and get noise of at most `text_noise` times the root mean square of each token. Texts are padded
    or cut to `text_length` tokens. The examples are a `window` of scenes, each used `uses` times on average. Compiling
    the blocks takes a minute and pays after three.
    """

    shape: InfinityConfig
    schedule: ScaleSchedule
    optimisation: Optimisation
    lengths: tuple[Length, ...]
    flip_rate: float = 0.25
    path_rate: float = 0.0
    coarse_share: float = 0.0
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
        for schedule in self.schedules:
            lengths = [length for length in self.lengths if (length.schedule or self.schedule) == schedule]
            scales = [length.scales for length in lengths if length.whole is None]
            if sorted(set(scales)) != scales or scales[-1:] != [len(schedule)] or scales[0] < 2:
                raise FoveateError(f"lengths must rise from 2 or more scales to all {len(schedule)}, got {scales}")
        for length in self.lengths:
            if length.whole is not None and not 0 < length.whole < length.scales:
                raise FoveateError(f"whole must be in [1, {length.scales - 1}], got {length.whole}")
        shares = [length.share for length in self.lengths]
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise FoveateError(f"the shares of lengths must be positive and add up to 1, got {shares}")
        if not (0 <= self.coarse_share <= 1 and 0 <= self.path_rate < 1):
            raise FoveateError(
                f"coarse_share must be in [0, 1] and path_rate in [0, 1), got {self.coarse_share} and {self.path_rate}"
            )
        if self.coarse_share > 0 and not any(length.share for length in self._lengths_at(0.0)):
            raise FoveateError("coarse_share needs a length that stops before the last scale, there is none")

    @property
    def schedules(self) -> tuple[ScaleSchedule, ...]:
        """The recipe's own schedule, then those of other aspect ratios."""
        return tuple(dict.fromkeys([self.schedule, *(length.schedule or self.schedule for length in self.lengths)]))

    def share_of(self, schedule: ScaleSchedule) -> float:
        """Share of the examples that have a schedule, once all lengths are in turn."""
        all_examples, own = 0.0, 0.0
        for length in self.lengths:
            all_examples += length.times * length.share
            own += length.times * length.share * ((length.schedule or self.schedule) == schedule)
        return own / all_examples

    def length_of(self, rng: np.random.Generator, progress: float) -> Length:
        """Draws the length of a step at a share of the minutes, `progress` in [0, 1]."""
        lengths = self._lengths_at(progress)
        ends = np.cumsum([length.share for length in lengths])
        return lengths[min(int(np.searchsorted(ends, rng.random() * ends[-1], side="right")), len(ends) - 1)]

    def _lengths_at(self, progress: float) -> tuple[Length, ...]:
        if progress >= self.coarse_share:
            return self.lengths
        return tuple(length for length in self.lengths if length.scales < len(length.schedule or self.schedule))


def bit_loss(logits_BLV: Float[Tensor, "B L V"], quantised: Quantised, scale_power: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy per bit: the weighted mean that is trained, and the plain mean of each scale."""
    target_BLZ = torch.cat([bits.flatten(1, 2) for bits in quantised.bits], dim=1)
    margin_BLZ = logits_BLV.unflatten(-1, (-1, 2)).diff(dim=-1).squeeze(-1)
    loss_L = F.binary_cross_entropy_with_logits(margin_BLZ, target_BLZ.float(), reduction="none").mean((0, 2))
    counts = [bits.shape[1] * bits.shape[2] for bits in quantised.bits]
    weight_L = torch.cat([torch.full((n,), n**-scale_power) for n in counts]).to(loss_L)
    per_scale = torch.stack([part.mean() for part in loss_L.split(counts)])
    return (loss_L * weight_L).sum() / weight_L.sum(), per_scale.detach()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Example:
    """One batch: texts, bits and their flips, which sublayers and tokens run, the schedule that all of it follows."""

    texts: PaddedTexts
    quantised: Quantised
    path_PB2: Float[Tensor, "P B 2"] | None
    schedule: ScaleSchedule
    crop: Crop | None


def _batch(recipe: TransformerRecipe, windows: Mapping[ScaleSchedule, Window], model: Infinity, run: Run) -> _Example:
    """The batch of a step; everything follows from its number, the clock and the examples seen."""
    rng = np.random.default_rng([recipe.optimisation.seed, run.step])
    length = recipe.length_of(rng, run.clock_s / (60 * recipe.optimisation.minutes))
    schedule = length.schedule or recipe.schedule
    seen = run.samples * recipe.share_of(schedule) / recipe.uses
    latents_BZHW, texts = windows[schedule].batch(seen, length.times * recipe.optimisation.batch, rng)
    for row, text_TE in enumerate(texts):
        if rng.random() < recipe.altered_share:
            text_TE = alter_text(text_TE, recipe.text_noise, rng)  # noqa: PLW2901 - the text that is taught
        is_unconditional = rng.random() < recipe.unconditional_share
        texts[row] = model.unconditional(text_TE.shape[0]) if is_unconditional else text_TE
    drawn_B = torch.from_numpy(rng.uniform(0, recipe.flip_rate, len(texts))).float()
    flips_B = to_device(drawn_B, latents_BZHW.device)
    generator = torch.Generator(recipe.device).manual_seed(int(rng.integers(2**62)))
    with torch.no_grad():
        quantised = quantise(latents_BZHW, schedule.grids[: length.scales], flips_B, generator)
    path_PB2 = None
    if recipe.path_rate > 0:
        path_PB2 = to_device(draw_paths(recipe.path_rate, recipe.shape.depth, len(texts), rng), latents_BZHW.device)
    crop = None if length.whole is None else Crop.drawn(length.whole, rng)
    return _Example(
        texts=pad_texts(texts, recipe.text_length),
        quantised=quantised if crop is None else crop.of(quantised),
        path_PB2=path_PB2,
        schedule=schedule,
        crop=crop,
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
    windows: Mapping[ScaleSchedule, Window],
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
        windows: What to learn, one for each of the recipe's schedules.
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
    plain = {schedule: _teacher(recipe, model, schedule) for schedule in recipe.schedules}
    # Other aspect ratios are too rare to be worth the minutes of compiling them.
    running = plain | ({recipe.schedule: plain[recipe.schedule].compiled()} if recipe.compiles else {})
    step_flops: dict[tuple[ScaleSchedule, int, int, int], int] = {}
    previewed_s = math.inf
    for _ in steps(run, recipe.optimisation, checkpoint, log, limits or Limits()):
        began = time.perf_counter()
        example = _batch(recipe, windows, model, run)
        run.note(input_ms=1e3 * (time.perf_counter() - began))
        texts, quantised = example.texts, example.quantised
        num_scales = len(quantised.bits)
        kind = (example.schedule, num_scales, len(texts.is_real_BT), quantised.bits[-1].shape[1])
        if kind not in step_flops:
            plainly = partial(plain[example.schedule].logits, texts, quantised.inputs, crop=example.crop)
            step_flops[kind] = 3 * flops_of(plainly)
        logits = running[example.schedule].logits(texts, quantised.inputs, example.path_PB2, example.crop)
        loss, per_scale = bit_loss(logits, quantised, recipe.scale_power)
        run.update(loss, recipe.optimisation)
        run.flops += step_flops[kind]
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


def _teacher(recipe: TransformerRecipe, model: Infinity, schedule: ScaleSchedule) -> Teacher:
    return Teacher(
        model=model, schedule=schedule, masked_tokens=recipe.masked_tokens, dtype=getattr(torch, recipe.dtype)
    )


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
