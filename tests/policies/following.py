"""A slow twin that follows one image through a run, token list by token list, and notes what signals are made of.

It is told which tokens ran; everything else it computes by itself: hidden states, changes, attention weights in
float64, logits, bits and what is committed. Tests recompute from its notes which tokens should have run.
Axes: l tokens of a scale, k tokens that ran, C width, V outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.plan import Base
from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.engine.forecast import forecast
from foveate.engine.state import Request
from tests.engine.naive import RowSlot, added, codes_of, enter, logits_of, sample_bits
from tests.toys import LENGTHS, SEEDS, Result, Toy, cached_run, make_request, text_features, toy


class NotingSlot(RowSlot):
    """The cache of one row and block; notes the entropy of the attention that it computed last."""

    def attend(self, q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
        out_nND = super().attend(q_nND, k_nND, v_nND, scale)
        weights = torch.einsum("qnd,knd->nqk", q_nND.double() * scale, self.past[0].double()).softmax(-1)
        self.entropy_n = torch.special.entr(weights).sum(-1).mean(0)
        return out_nND


@dataclass(kw_only=True)
class Branch:
    """One image in one branch; per block what its tokens had in front, what the block added, and their entropies."""

    subject: Toy
    text: Tensor
    slots: list[NotingSlot] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prepared = self.subject.model.prepare([self.text], False)
        self.slots = [NotingSlot() for _ in range(self.subject.num_blocks)]

    def run(self, scale: int, x_lC: Tensor | None, kept: Sequence[int]) -> Tensor:
        """Logits (k, V) of the kept tokens; what is noted of the others is zero."""
        model = self.subject.model
        x_lC = model.start(self.prepared) if x_lC is None else x_lC
        x_kC, rotation_kD = x_lC[kept], model.positions(self.subject.schedule, scale)[kept]
        rows = Rows((len(kept),))
        self.inputs, self.deltas, self.entropies = [], [], []
        for block, slot in enumerate(self.slots):
            before_kC = x_kC
            context = BlockContext(rows=rows, prepared=self.prepared, rotation_nD=rotation_kD, slot=slot)
            for sublayer in range(3):
                x_kC = x_kC + added(model.block(block).change(sublayer, x_kC, context), rows)
            for notes, value in (
                (self.inputs, before_kC),
                (self.deltas, x_kC - before_kC),
                (self.entropies, slot.entropy_n),
            ):
                whole = torch.zeros(len(x_lC), *value.shape[1:], dtype=value.dtype)
                whole[kept] = value
                notes.append(whole)
        return logits_of(model, x_kC, rows, self.prepared)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One scale of one image: per block the notes of the conditional branch, the changes of both, and the rest."""

    grid: tuple[int, int]
    kept: list[int]
    inputs: list[Tensor]
    entropies: list[Tensor]
    deltas: tuple[list[Tensor], list[Tensor]]
    logits_kV: Tensor
    f_hat: Tensor
    num_lost: int


@torch.inference_mode()
def follow(
    subject: Toy,
    request: Request,
    image: int,
    kept: Sequence[Sequence[int]],
    base: Base = Base.ZERO,
    sources: Sequence[Sequence[int] | None] = (),
) -> list[Seen]:
    """Every scale of one image, both branches, given the tokens that ran and, for copies, what each token copies."""
    text, seed, patch = text_features(SEEDS[image], LENGTHS[image]), SEEDS[image], subject.schedule.patch
    cond = Branch(subject=subject, text=text)
    uncond = Branch(subject=subject, text=subject.model.unconditional(len(text)))
    f_hat = torch.zeros(1, subject.tokenizer.latent_channels, *subject.schedule.latent_grid(len(kept) - 1))
    residual, seen = torch.zeros(1, subject.tokenizer.latent_channels, 1, 1), []
    for scale, ((h, w), own) in enumerate(zip(subject.schedule.grids, kept, strict=True)):
        x_lC = enter(subject, f_hat, scale)[0] if scale else None
        logits_kV, other_kV = cond.run(scale, x_lC, own), uncond.run(scale, x_lC, own)
        weight, temperature = request.guidance.weights[scale], request.temperatures[scale]
        guided_kV = (other_kV + weight * (logits_kV - other_kV)) / temperature
        bits_kd = sample_bits(guided_kV, own, h * w, seed, scale, request.filters[scale])
        bits = torch.zeros(h * w, bits_kd.shape[-1], dtype=torch.long)
        bits[own] = bits_kd
        dropped = sorted(set(range(h * w)) - set(own))
        source = sources[scale] if base is Base.COPY and sources[scale] is not None else list(range(h * w))
        lost = [token for token in dropped if source[token] not in own]
        for token in dropped:
            bits[token] = bits[source[token]]
        mask = torch.ones(h * w)
        mask[lost if base is Base.COPY else dropped] = 0
        size = (h * patch, w * patch)
        mask = F.interpolate(mask.view(1, 1, h, w), size=size, mode="nearest")
        before = F.interpolate(residual, size=size, mode="nearest") if base is Base.PREVIOUS else torch.zeros(1)
        residual = codes_of(bits, (h, w), patch)[None] * mask + before * (1 - mask)
        f_hat = f_hat + F.interpolate(residual, size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
        seen.append(
            Seen(
                grid=(h, w),
                kept=list(own),
                inputs=cond.inputs,
                entropies=cond.entropies,
                deltas=(cond.deltas, uncond.deltas),
                logits_kV=logits_kV,
                f_hat=f_hat[0],
                num_lost=len(lost) * (base is Base.COPY),
            )
        )
    return seen


def kept_of(result: Result, name: str, image: int) -> list[list[int]]:
    """The tokens that a run kept of one image, at every scale."""
    grids = toy(name).schedule.grids
    return [result.choices[scale].positions(image, h * w) for scale, (h, w) in enumerate(grids)]


def enlarged(values: Sequence[float], source: tuple[int, int], grid: tuple[int, int]) -> list[float]:
    """Bilinear, one token after the other."""

    def place(i: int, size: int, before: int) -> tuple[int, int, float]:
        centre = max((i + 0.5) * before / size - 0.5, 0.0)
        low = min(int(centre), before - 1)
        return low, min(low + 1, before - 1), centre - low

    out = []
    for i in range(grid[0]):
        y0, y1, dy = place(i, grid[0], source[0])
        for j in range(grid[1]):
            x0, x1, dx = place(j, grid[1], source[1])
            corners = [float(values[y * source[1] + x]) for y in (y0, y1) for x in (x0, x1)]
            top = corners[0] * (1 - dx) + corners[1] * dx
            out.append(top * (1 - dy) + (corners[2] * (1 - dx) + corners[3] * dx) * dy)
    return out


def assert_highest(kept: Sequence[int], scores: Sequence[float], count: int, always: Sequence[int] = ()) -> None:
    """The `count` highest scores are kept, and some tokens always; scores within float error count as equal."""
    ordered = sorted(scores, reverse=True)
    edge = ordered[min(count, len(scores)) - 1] if count else float("inf")
    slack = 1e-4 * (ordered[0] - ordered[-1]) if count else 0.0
    assert len(set(kept) | set(always)) == len(kept) == len(set(kept))
    assert len(kept) >= count
    for token, score in enumerate(scores):
        if abs(score - edge) > slack and token not in always:
            assert (token in kept) == (score > edge)


def replayed_by_score(spec: str, name: str, scores_of, share: float, num_scales: int, base: Base) -> list[list[Seen]]:
    """Redoes a run of the usual request: every choice from the notes of the scale before, every latent from the bits.

    `scores_of` makes one score per token of the notes of one scale.
    """
    result, subject = cached_run(spec, name), toy(name)
    pages = []
    for image in range(len(SEEDS)):
        kept = kept_of(result, name, image)
        seen = follow(subject, make_request(subject.schedule), image, kept, base)
        for scale, (h, w) in enumerate(subject.schedule.grids):
            if scale < len(kept) - num_scales:
                assert kept[scale] == list(range(h * w))
            else:
                before = seen[scale - 1]
                scores = enlarged(scores_of(before), before.grid, (h, w))
                # The share is rounded up, up to the same rounding of floats that the engine forgives.
                count = -int(-(share * h * w - 1e-9) // 1)
                assert len(kept[scale]) == count
                assert_highest(kept[scale], scores, count)
            assert torch.allclose(result.f_hats[scale][image], seen[scale].f_hat, atol=1e-4)
        pages.append(seen)
    return pages


def assert_forecast_holds(result: Result, name: str, *, is_static: bool) -> None:
    """What was known before a run of the usual request is what was counted, or more where content decides."""
    subject = toy(name)
    before = forecast(result.bound, make_request(subject.schedule), subject.model.shape)
    counted = result.trace.cost
    assert result.bound.is_static == is_static
    if is_static:
        assert before == counted
    else:
        assert before.flops >= counted.flops
        assert before.tokens >= counted.tokens
        assert before.kv_bytes >= counted.kv_bytes
    assert counted.flops < cached_run("full", name).trace.cost.flops
