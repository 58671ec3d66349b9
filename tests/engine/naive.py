"""The slow twins of the engine: no plan, no preallocated cache, no packing tricks.

They share only the model's blocks and the attention of one group, which has a slow twin of its own (`tests/kernels`).

`generate` is the plain loop of next-scale prediction on a dense batch. `generate_planned` is told what every image runs
at every scale and does so row by row, token list by token list; it is compared within float error.
Axes: B images, R rows, n tokens of all rows, l tokens of a scale, d bits of a token, Z channels, C width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.plan import Base, KeepOutputs
from foveate.core.protocols import BlockContext, Change
from foveate.core.rows import Rows
from foveate.engine.state import Request
from foveate.kernels.attention import attend_group
from tests.toys import LATENT_CHANNELS, Result, Toy


class GrowingSlot:
    """Keys and values of one block, grown by concatenation; all rows hold equally many."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def attend(self, q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
        k, v = (x.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for x in (k_nND, v_nND))
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return attend_group(q_nND, self.k, self.v, scale)


def draw(seed: int, scale: int, num_values: int) -> list[float]:
    """Keyed draws of a scale, one after the other."""
    raw = np.random.Philox(key=np.array([seed, 256 * scale], dtype=np.uint64)).random_raw(num_values)
    return [((int(r) >> 41) + 0.5) / 2**23 for r in raw]


def filtered(logits: Sequence[float], top_k: int, top_p: float) -> list[float]:
    """Probabilities of one symbol after top-k and top-p, value by value."""
    values = [float(x) for x in logits]
    if top_k:
        kth = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        values = [x if x >= kth else -np.inf for x in values]
    if top_p:
        shares = np.exp(np.array(values) - max(values))
        shares = shares / shares.sum()
        total = 0.0
        for i in sorted(range(len(values)), key=lambda i: values[i])[:-1]:
            total += shares[i]
            if total <= 1 - top_p:
                values[i] = -np.inf
    weights = np.exp(np.array(values) - max(values))
    return list(weights / weights.sum())


def sample_bits(logits_lV: Tensor, positions: Sequence[int], num_tokens: int, seed: int, scale: int, rule) -> Tensor:
    """One bit after the other: bit = u < p1, with the draw of its place in the whole map."""
    num_bits = logits_lV.shape[-1] // 2
    u = draw(seed, scale, num_tokens * num_bits)
    bits = torch.zeros(len(positions), num_bits, dtype=torch.long)
    for i, position in enumerate(positions):
        for bit in range(num_bits):
            pair = logits_lV[i, 2 * bit : 2 * bit + 2].tolist()
            if rule.top_k == 1:
                bits[i, bit] = int(pair[1] > pair[0])
            else:
                bits[i, bit] = int(u[position * num_bits + bit] < filtered(pair, rule.top_k, rule.top_p)[1])
    return bits


def codes_of(bits_ld: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Codes (Z, h, w) of one image: bit c * patch^2 + dy * patch + dx of a token is channel c of latent (dy, dx)."""
    num_channels = bits_ld.shape[-1] // patch**2
    codes = torch.zeros(num_channels, grid[0] * patch, grid[1] * patch)
    for token, bits in enumerate(bits_ld.tolist()):
        for index, bit in enumerate(bits):
            channel, inside = divmod(index, patch**2)
            y, x = token // grid[1] * patch + inside // patch, token % grid[1] * patch + inside % patch
            codes[channel, y, x] = (1 if bit else -1) * num_channels**-0.5
    return codes


def added(change: Change, rows: Rows) -> Tensor:
    """What a sublayer adds to the hidden states."""
    gate = 1.0 if change.gate_RC is None else rows.spread(change.gate_RC)
    return change.value_nC.float() * gate


def logits_of(model, x_nC: Tensor, rows: Rows, prepared) -> Tensor:
    """The head."""
    return model.head_logits(model.head_input(x_nC, rows, prepared))


def enter(toy: Toy, f_hat_BZHW: Tensor, scale: int) -> Tensor:
    """Embedded input of a scale > 0, (B, l, C)."""
    patch, grid = toy.schedule.patch, toy.schedule.grids[scale]
    size = (grid[0] * patch, grid[1] * patch)
    small = F.interpolate(f_hat_BZHW, size=size, mode="bilinear", align_corners=False)
    return toy.model.embed(F.pixel_unshuffle(small, patch) if patch > 1 else small, scale)


@torch.inference_mode()
def generate(toy: Toy, request: Request, seeds: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The plain loop: latents and bits (B, l, d) of every scale. Every scale is guided."""
    model, num_images = toy.model, request.num_images
    prepared = model.prepare(request.conditions, not request.has_negative)
    num_rows = 2 * num_images
    slots = [GrowingSlot(num_rows) for _ in range(toy.num_blocks)]
    f_hat = torch.zeros(num_images, toy.tokenizer.latent_channels, *toy.schedule.latent_grid(len(toy.schedule) - 1))
    f_hats, all_bits = [], []
    for scale, (h, w) in enumerate(toy.schedule.grids):
        x = enter(toy, f_hat, scale).repeat(2, 1, 1).flatten(0, 1) if scale else model.start(prepared).clone()
        if not model.shape.is_cached:
            slots = [GrowingSlot(num_rows) for _ in range(toy.num_blocks)]
        rows = Rows((h * w,) * num_rows)
        rotation = model.positions(toy.schedule, scale).repeat(num_rows, 1)
        for index in range(toy.num_blocks):
            context = BlockContext(rows=rows, prepared=prepared, rotation_nD=rotation, slot=slots[index])
            for sublayer in range(3):
                x = x + added(model.block(index).change(sublayer, x, context), context.rows)
        cond, uncond = logits_of(model, x, rows, prepared).chunk(2)
        guide, inverse = request.guidance.weights[scale], 1 / request.temperatures[scale]
        logits = guide * (cond * inverse) + (1 - guide) * (uncond * inverse)
        rule, codes, bits = request.filters[scale], [], []
        for seed, part in zip(seeds, logits.unflatten(0, (num_images, -1)), strict=True):
            bits.append(sample_bits(part, range(h * w), h * w, seed, scale, rule))
            codes.append(codes_of(bits[-1], (h, w), toy.schedule.patch))
        f_hat = f_hat + F.interpolate(torch.stack(codes), size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
        f_hats.append(f_hat)
        all_bits.append(torch.stack(bits))
    return f_hats, all_bits


@dataclass(kw_only=True)
class Decision:
    """What one image runs at one scale; a token of depth D runs the first D blocks of `order`.

    Only recorded changes fill later scales; a dropped token's change is what is filled there, or zero.
    """

    keep_l: list[bool]
    depth_l: list[int]
    order: tuple[int, ...]
    weight_l: list[float]
    is_guided: bool
    is_cached: bool = False
    repeats_base: bool = False
    is_recorded: bool = False


def decisions_of(result: Result, image: int) -> list[Decision | None]:
    """What a run with maps did to one image, read from its trace and its plans."""
    decisions: list[Decision | None] = []
    for trace, plan in zip(result.trace.scales, result.bound.plans, strict=True):
        if not trace.ran:
            decisions.append(None)
            continue
        num_blocks, num_tokens = result.trace.shape.num_blocks, trace.work.grid_tokens
        weight_Bl = torch.ones(1, num_tokens) if plan.weight_Bl is None else plan.weight_Bl
        decisions.append(
            Decision(
                keep_l=trace.keep_Bl[image].tolist(),
                depth_l=trace.depth_Bl[image].tolist(),
                order=plan.depths[0].order if plan.depths else tuple(range(num_blocks)),
                weight_l=weight_Bl[image % len(weight_Bl)].tolist(),
                is_guided=(image, False) in trace.work.rows,
                is_cached=plan.fill is not None,
                repeats_base=plan.base is Base.PREVIOUS,
                is_recorded=KeepOutputs() in result.bound.keeps(trace.scale),
            )
        )
    return decisions


@dataclass(kw_only=True)
class Page:
    """What the planned twin computed: latents and bits per scale, and mean |delta| summed over blocks, per token."""

    f_hats: list[Tensor] = field(default_factory=list)
    changes: list[list[float]] = field(default_factory=list)


def attend_list(past: list[Tensor], q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
    """Attention of one row by its definition; `past` holds its keys and values and grows."""
    past[:] = [k_nND, v_nND] if not past else [torch.cat((past[0], k_nND)), torch.cat((past[1], v_nND))]
    weights = torch.einsum("qnd,knd->nqk", q_nND * scale, past[0]).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, past[1])


class RowSlot:
    """The cache of one row and block."""

    def __init__(self) -> None:
        self.past: list[Tensor] = []

    def attend(self, q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
        return attend_list(self.past, q_nND, k_nND, v_nND, scale)


def resized(delta_lC: Tensor, source: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Token deltas on another grid, bilinearly, in float64."""
    map_1Chw = delta_lC.double().T.unflatten(-1, source)[None]
    return F.interpolate(map_1Chw, size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T.float()


class PlannedRow:
    """One image in one branch."""

    def __init__(self, toy: Toy, text: Tensor) -> None:
        self.toy = toy
        self.prepared = toy.model.prepare([text], False)
        self.slots = [RowSlot() for _ in range(toy.num_blocks)]
        self.deltas: list[Tensor] = []
        self.grid = (1, 1)

    def run(self, scale: int, x_lC: Tensor, decision: Decision) -> tuple[Tensor, list[float]]:
        """Logits of all tokens (dropped ones hold nonsense) and each token's summed change."""
        model, grid = self.toy.model, self.toy.schedule.grids[scale]
        rotation_lD = model.positions(self.toy.schedule, scale)
        tokens = range(len(x_lC))
        if not model.shape.is_cached:
            self.slots = [RowSlot() for _ in range(self.toy.num_blocks)]
        old = [resized(delta, self.grid, grid) for delta in self.deltas]
        fresh = []
        for block in range(self.toy.num_blocks):
            place = decision.order.index(block)
            active = [t for t in tokens if decision.keep_l[t] and decision.depth_l[t] > place]
            change_lC = old[block].clone() if old else torch.zeros_like(x_lC)
            if not decision.is_cached:
                change_lC[[t for t in tokens if decision.keep_l[t]]] = 0
            if active:
                before, part = x_lC[active], x_lC[active]
                context = BlockContext(
                    rows=Rows((len(active),)),
                    prepared=self.prepared,
                    rotation_nD=rotation_lD[active],
                    slot=self.slots[block],
                )
                for sublayer in range(3):
                    part = part + added(model.block(block).change(sublayer, part, context), context.rows)
                change_lC[active] = part - before
            x_lC = x_lC + change_lC
            fresh.append(change_lC)
        if decision.is_recorded:
            self.deltas, self.grid = fresh, grid
        sums = [sum(float(delta[t].abs().mean()) for delta in fresh) for t in tokens]
        return logits_of(model, x_lC, Rows((len(x_lC),)), self.prepared), sums


@torch.inference_mode()
def generate_planned(
    toy: Toy, text_TE: Tensor, seed: int, decisions: Sequence[Decision | None], request: Request
) -> Page:
    """One image by itself, as decided; None stands for a scale that does not run."""
    model, patch = toy.model, toy.schedule.patch
    cond, uncond = PlannedRow(toy, text_TE), PlannedRow(toy, model.unconditional(len(text_TE)))
    f_hat = torch.zeros(1, LATENT_CHANNELS, *toy.schedule.latent_grid(len(toy.schedule) - 1))
    residual = torch.zeros(LATENT_CHANNELS, 1, 1)
    page = Page()
    for scale, ((h, w), decision) in enumerate(zip(toy.schedule.grids, decisions, strict=True)):
        if decision is None:
            page.f_hats.append(f_hat)
            page.changes.append([])
            continue
        logits, change = cond.run(scale, enter(toy, f_hat, scale)[0] if scale else model.start(cond.prepared), decision)
        if decision.is_guided:
            start = enter(toy, f_hat, scale)[0] if scale else model.start(uncond.prepared)
            guide = request.guidance.weights[scale]
            logits = guide * logits + (1 - guide) * uncond.run(scale, start, decision)[0]
        logits = logits / request.temperatures[scale]
        codes = codes_of(sample_bits(logits, range(h * w), h * w, seed, scale, request.filters[scale]), (h, w), patch)
        base, residual = residual, torch.zeros(LATENT_CHANNELS, h * patch, w * patch)
        for y in range(h * patch):
            for x in range(w * patch):
                token = y // patch * w + x // patch
                if decision.keep_l[token]:
                    residual[:, y, x] = decision.weight_l[token] * codes[:, y, x]
                elif decision.repeats_base:
                    ratio_y, ratio_x = base.shape[1] / (h * patch), base.shape[2] / (w * patch)
                    residual[:, y, x] = base[:, int(y * ratio_y + 1e-6), int(x * ratio_x + 1e-6)]
        f_hat = f_hat + F.interpolate(residual[None], size=f_hat.shape[-2:], mode="bilinear", align_corners=False)
        page.f_hats.append(f_hat)
        page.changes.append(change)
    return page
