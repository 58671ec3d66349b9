"""The slow twin of the methods for late scales: one image by itself, row by row, over lists of tokens and of scales.

It uses the models' blocks and the tokenizers, nothing of the engine: attention is written out over keys that are listed
scale by scale, symbols are drawn one after the other.
Axes: l tokens of a scale, k tokens that run, C width, V outputs, W width of a difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.core.conditions import ClassLabel
from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.engine.state import Request
from tests.engine.naive import added, draw, filtered, resized, sample_bits
from tests.toys import SEEDS, Result, Toy


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an image runs at one scale.

    `seen` are the earlier scales whose keys it reads. `kept` tokens run (the others commit zero), `guided` ones of them
    in the unconditional branch too. Elsewhere the difference of scale `source` guides, times `weight`.
    """

    seen: tuple[int, ...]
    kept: tuple[int, ...]
    guided: tuple[int, ...]
    source: int | None = None
    weight: float = 0.0


@dataclass(kw_only=True)
class Page:
    """What the twin computed at every scale."""

    f_hats: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    symbols: list[Tensor] = field(default_factory=list)
    differences: dict[int, Tensor] = field(default_factory=dict)


def full_steps(toy: Toy) -> list[Step]:
    """Everything runs and sees everything before it."""
    tokens = [tuple(range(scale.num_tokens)) for scale in toy.schedule.scales]
    return [Step(seen=tuple(range(s)), kept=part, guided=part) for s, part in enumerate(tokens)]


class ListedSlot:
    """Keys and values of one row and block by scale; attention by its definition over those that are named."""

    def __init__(self, past: dict[int, tuple[Tensor, Tensor]], scale: int, seen: Sequence[int]) -> None:
        self.past, self.scale, self.seen = past, scale, tuple(seen)

    def attend(self, q_nND: Tensor, k_nND: Tensor, v_nND: Tensor, scale: float) -> Tensor:
        self.past[self.scale] = (k_nND, v_nND)
        keys, values = (torch.cat([self.past[s][part] for s in (*self.seen, self.scale)]) for part in (0, 1))
        out_nND = torch.empty_like(q_nND)
        for head in range(q_nND.shape[1]):
            scores_nm = scale * q_nND[:, head].double() @ keys[:, head].double().T
            out_nND[:, head] = (scores_nm.softmax(-1) @ values[:, head].double()).float()
        return out_nND


class Row:
    """One image in one branch."""

    def __init__(self, toy: Toy, condition: object) -> None:
        self.toy, self.prepared = toy, toy.model.prepare([condition], False)
        self.past: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(toy.num_blocks)]

    def run(self, scale: int, f_hat_BZHW: Tensor, tokens: Sequence[int], seen: Sequence[int]) -> Tensor:
        """What the head reads at the tokens that run, (k, C)."""
        model, grid, tokens = self.toy.model, self.toy.schedule.grids[scale], list(tokens)
        if scale:
            x_lC = model.embed(self.toy.tokenizer.next_input(f_hat_BZHW, grid), scale)[0]
        else:
            x_lC = model.start(self.prepared)
        x_kC, rows = x_lC[tokens], Rows((len(tokens),))
        for index, past in enumerate(self.past):
            block = model.block(index)
            context = BlockContext(
                rows=rows,
                prepared=self.prepared,
                rotation_nD=model.positions(self.toy.schedule, scale)[tokens],
                slot=ListedSlot(past, scale, seen),
            )
            for sublayer in range(block.num_sublayers):
                x_kC = x_kC + added(block.change(sublayer, x_kC, context), rows)
        return model.head_input(x_kC, rows, self.prepared)


def sample_ids(logits_kV: Tensor, positions: Sequence[int], num_tokens: int, seed: int, scale: int, rule) -> Tensor:
    """One id after the other: the largest of p / -log(u), with the draws of its place in the whole map."""
    num_values = logits_kV.shape[-1]
    u = draw(seed, scale, num_tokens * num_values)
    ids = torch.zeros(len(positions), 1, dtype=torch.long)
    for i, position in enumerate(positions):
        p = filtered(logits_kV[i].tolist(), rule.top_k, rule.top_p)
        race = [p[v] / -math.log(u[position * num_values + v]) for v in range(num_values)]
        ids[i, 0] = max(range(num_values), key=race.__getitem__)
    return ids


def none_of(toy: Toy, condition: object) -> object:
    """What stands for no condition."""
    if isinstance(condition, ClassLabel):
        return ClassLabel(index=toy.model.config.num_classes)
    return toy.model.unconditional(len(condition))


def residual_of(toy: Toy, symbols_kd: Tensor, kept: Sequence[int], scale: int) -> Tensor:
    """The codes of the tokens that ran, zero elsewhere; (1, Z, y, x)."""
    grid, patch = toy.schedule.grids[scale], toy.schedule.patch
    whole_ld = torch.zeros(grid[0] * grid[1], symbols_kd.shape[-1], dtype=torch.long)
    whole_ld[list(kept)] = symbols_kd
    residual_BZyx = toy.tokenizer.residual(whole_ld[None], grid)
    for token in set(range(len(whole_ld))) - set(kept):
        y, x = token // grid[1] * patch, token % grid[1] * patch
        residual_BZyx[..., y : y + patch, x : x + patch] = 0
    return residual_BZyx


def reads_inputs(toy: Toy) -> bool:
    """Whether a difference is one of head inputs: where they are no wider than the head's outputs."""
    return toy.model.shape.width <= toy.model.shape.head_outputs


def guided_logits(toy: Toy, cond_of: dict, uncond_of: dict, old_lW: Tensor | None, step: Step, w: float) -> Tensor:
    """Logits of the tokens that run, one after the other: w cond + (1 - w) uncond, or what stands for the latter."""
    head, rows = toy.model.head_logits, []
    for token, c_C in cond_of.items():
        cond_1V = head(c_C[None])
        if token in uncond_of:
            rows.append(w * cond_1V + (1 - w) * head(uncond_of[token][None]))
        elif old_lW is None:
            rows.append(cond_1V)
        elif reads_inputs(toy):
            rows.append(w * cond_1V + (1 - w) * head((c_C - step.weight * old_lW[token])[None]))
        else:
            rows.append(w * cond_1V + (1 - w) * (cond_1V - step.weight * old_lW[token]))
    return torch.cat(rows)


@torch.inference_mode()
def generate_image(toy: Toy, request: Request, image: int, steps: Sequence[Step]) -> Page:
    """One image of a request by itself."""
    model, condition, page = toy.model, request.conditions[image], Page()
    cond, uncond = Row(toy, condition), Row(toy, none_of(toy, condition))
    num_scales, sample = len(steps), sample_ids if isinstance(condition, ClassLabel) else sample_bits
    f_hat = torch.zeros(1, toy.tokenizer.latent_channels, *toy.schedule.latent_grid(num_scales - 1))
    for scale, (grid, step) in enumerate(zip(toy.schedule.grids, steps, strict=True)):
        num_tokens = grid[0] * grid[1]
        cond_of = dict(zip(step.kept, cond.run(scale, f_hat, step.kept, step.seen), strict=True))
        uncond_of = {}
        if step.guided:
            uncond_of = dict(zip(step.guided, uncond.run(scale, f_hat, step.guided, step.seen), strict=True))
        if len(cond_of) == len(uncond_of) == num_tokens:
            both = [torch.stack(list(part.values())) for part in (cond_of, uncond_of)]
            a, b = both if reads_inputs(toy) else map(model.head_logits, both)
            page.differences[scale] = a - b
        old_lW = None
        if step.source is not None:
            old_lW = resized(page.differences[step.source], toy.schedule.grids[step.source], grid)
        logits = guided_logits(toy, cond_of, uncond_of, old_lW, step, request.guidance.weights[scale])
        logits = logits / request.temperatures[scale]
        symbols = sample(logits, step.kept, num_tokens, SEEDS[image], scale, request.filters[scale])
        f_hat = toy.tokenizer.add(f_hat, residual_of(toy, symbols, step.kept, scale), scale, num_scales)
        page.f_hats.append(f_hat)
        page.logits.append(logits)
        page.symbols.append(symbols)
    return page


def assert_same(result: Result, page: Page, image: int) -> None:
    """A run and the twin saw the same logits, drew the same symbols and made the same latents."""
    for scale, choice in result.choices.items():
        assert torch.allclose(choice.logits[image].flatten(1), page.logits[scale].flatten(1), atol=1e-4)
        assert torch.equal(choice.symbols[image], page.symbols[scale])
        assert torch.allclose(result.f_hats[scale][image], page.f_hats[scale][0], atol=1e-5)
    assert len(result.choices) == len(page.f_hats)
