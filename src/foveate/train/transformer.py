"""Trains the Infinity transformer on the latents of a fixed set of drawings.

Every drawing is encoded once; a step quantises the latents anew with flipped bits, so that later scales learn to
correct earlier mistakes (bitwise self-correction). Half of the steps see the first scales only, which cost a fraction.
The blocks are those that generate: training gives them another `KVSlot`, in which all scales stand side by side.
Axes: B drawings, L tokens of all scales, l of one scale, n = B L packed tokens, Z bits, C width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.core.schedule import ScaleSchedule
from foveate.kernels.residual import gated
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.bsq import Quantised, quantise
from foveate.train.captions import NUM_FRAMED
from foveate.train.loop import Optimisation, Run, steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerRecipe:
    """The transformer's shape, its schedule and how it is trained.

    `flip_rate` is the largest share of flipped bits; `short_share` of the steps train the first `short_scales` scales
    only; a token of a scale with n tokens weighs n ** -`scale_power`. Each drawing has `framed_captions` long captions
    beside its short ones. Of all texts `altered_share` are made harder: they lose some of their tokens, never the
    sentence embedding, and get noise of at most `text_noise` times the root mean square of each token.
    """

    shape: InfinityConfig
    schedule: ScaleSchedule
    optimisation: Optimisation
    flip_rate: float = 0.25
    short_share: float = 0.5
    short_scales: int = 6
    scale_power: float = 0.5
    unconditional_share: float = 0.1
    framed_captions: int = NUM_FRAMED
    altered_share: float = 0.5
    text_noise: float = 0.7
    masked_tokens: int = 128
    dtype: str = "bfloat16"
    device: str = "cpu"


class TeacherSlot:
    """All scales at once: a scale sees itself and the earlier ones (`core.protocols.KVSlot`).

    Scales that end within the first `masked_tokens` tokens share one masked call, each later one has an unmasked one.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], num_rows: int, masked_tokens: int, device: str) -> None:
        self.num_rows = num_rows
        ends = np.cumsum([h * w for h, w in grids]).tolist()
        self.first = max((end for end in ends if end <= masked_tokens), default=0)
        self.ends = [end for end in ends if end > self.first]
        scale_L = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(np.diff([0, *ends])))[: self.first]
        self.mask_ll = (scale_L[:, None] >= scale_L[None]).to(device)

    def attend(
        self,
        q_nND: Float[Tensor, "n N D"],
        k_nND: Float[Tensor, "n N D"],
        v_nND: Float[Tensor, "n N D"],
        scale: float,
    ) -> Float[Tensor, "n N D"]:
        """Block-causal attention over the packed rows."""
        q, k, v = (t.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for t in (q_nND, k_nND, v_nND))
        first = self.first
        parts = []
        if first:
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, :first], k[:, :, :first], v[:, :, :first], attn_mask=self.mask_ll, scale=scale
                )
            )
        begin = first
        for end in self.ends:
            parts.append(F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=scale))
            begin = end
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1)


def teacher_logits(
    model: Infinity,
    texts: Sequence[Float[Tensor, "_ E"]],
    quantised: Quantised,
    schedule: ScaleSchedule,
    masked_tokens: int = 128,
) -> Float[Tensor, "B L V"]:
    """Logits of every scale, each from the true (or flipped) earlier ones."""
    num_scales = len(quantised.bits)
    prepared = model.prepare(texts)
    entries = [model.start(prepared)[:, None]]
    entries += [model.embed(quantised.inputs[s - 1], s) for s in range(1, num_scales)]
    x_BLC = torch.cat(entries, dim=1)
    num_rows, length, _ = x_BLC.shape
    rotation_LD = torch.cat([model.positions(schedule, s) for s in range(num_scales)])
    rows = Rows((length,) * num_rows)
    context = BlockContext(
        rows=rows,
        prepared=prepared,
        rotation_nD=rotation_LD.repeat(num_rows, 1),
        slot=TeacherSlot(schedule.grids[:num_scales], num_rows, masked_tokens, str(x_BLC.device)),
    )
    x_nC = x_BLC.flatten(0, 1)
    for index in range(model.config.depth):
        block = model.block(index)
        for sublayer in range(block.num_sublayers):
            change = block.change(sublayer, x_nC, context)
            x_nC = x_nC + gated(change.value_nC, change.gate_RC, rows)
    return model.logits(x_nC, rows, prepared).unflatten(0, (num_rows, length))


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
class Examples:
    """The drawings as latents (N, Z, H, W), and the text features of each one's captions."""

    latents: Tensor
    captions: tuple[tuple[Tensor, ...], ...]


def _batch(recipe: TransformerRecipe, examples: Examples, model: Infinity, step: int) -> tuple[list[Tensor], Quantised]:
    """Drawings, captions, flips and the number of scales of one step; everything follows from the step's number."""
    rng = np.random.default_rng([recipe.optimisation.seed, step])
    chosen = rng.integers(0, len(examples.latents), recipe.optimisation.batch)
    texts: list[Tensor] = []
    for index in chosen:
        captions = examples.captions[index]
        text = captions[int(rng.integers(len(captions)))]
        if rng.random() < recipe.altered_share:
            text = alter_text(text, recipe.text_noise, rng)
        is_unconditional = rng.random() < recipe.unconditional_share
        texts.append(model.unconditional(text.shape[0]) if is_unconditional else text)
    is_short = rng.random() < recipe.short_share
    grids = recipe.schedule.grids
    flips = torch.from_numpy(rng.uniform(0, recipe.flip_rate, len(chosen))).float().to(recipe.device)
    generator = torch.Generator(recipe.device).manual_seed(int(rng.integers(2**62)))
    with torch.no_grad():
        quantised = quantise(examples.latents[torch.from_numpy(chosen)], grids, flips, generator)
    count = recipe.short_scales if is_short else len(grids)
    return texts, Quantised(
        bits=quantised.bits[:count], inputs=quantised.inputs[: count - 1], f_hat_BZHW=quantised.f_hat_BZHW
    )


def alter_text(text_TE: Float[Tensor, "T E"], noise: float, rng: np.random.Generator) -> Float[Tensor, "_ E"]:
    """Drops a random share of the tokens behind the first and adds noise, so that near meanings draw the same."""
    share = rng.random()
    kept = [0, *(t for t in range(1, text_TE.shape[0]) if rng.random() >= share)]
    text_TE = text_TE[kept]
    drawn_TE = torch.from_numpy(rng.standard_normal(text_TE.shape, dtype=np.float32)).to(text_TE)
    return text_TE + drawn_TE * (noise * rng.random() * text_TE.square().mean(1, keepdim=True).sqrt())


def train_transformer(
    recipe: TransformerRecipe,
    examples: Examples,
    checkpoint: Path,
    log: Callable[[str], None],
    preview: Callable[[dict[str, Tensor]], None] | None = None,
    preview_every_s: float = 900.0,
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Trains until the recipe's minutes are used up, resuming from `checkpoint` if it exists.

    Args:
        recipe: Shape, schedule, optimisation.
        examples: What to learn.
        checkpoint: Where the state of the run lives.
        log: Receives one line every two minutes of training.
        preview: Called with the averaged weights now and then, to draw a sample sheet.
        preview_every_s: Seconds of training between previews.
        initial: Weights to start from; a checkpoint goes before them.

    Returns:
        The averaged weights, float32.
    """
    torch.manual_seed(recipe.optimisation.seed)
    model = Infinity(recipe.shape).to(recipe.device)
    small_start(model)
    if initial is not None:
        model.load_state_dict(initial)
    run = Run.start(model, recipe.optimisation)
    dtype = getattr(torch, recipe.dtype)
    previewed_s = 0.0
    for step in steps(run, recipe.optimisation, checkpoint, log):
        texts, quantised = _batch(recipe, examples, model, step)
        with torch.autocast(recipe.device, dtype, enabled=dtype != torch.float32):
            logits = teacher_logits(model, texts, quantised, recipe.schedule, recipe.masked_tokens)
        loss, per_scale = bit_loss(logits.float(), quantised, recipe.scale_power)
        run.update(loss, recipe.optimisation)
        run.note(loss=float(loss.detach()), coarse=float(per_scale[: recipe.short_scales].mean()))
        if len(per_scale) > recipe.short_scales:
            run.note(last=float(per_scale[-1]))
        if preview is not None and run.clock_s - previewed_s > preview_every_s:
            previewed_s = run.clock_s
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
