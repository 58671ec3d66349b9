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
from foveate.core.plan import Spread, SpreadDifference
from foveate.core.protocols import BlockContext
from foveate.core.rows import Rows
from foveate.engine.state import Request
from tests.engine.naive import added, draw, filtered, resized, sample_bits
from tests.toys import SEEDS, Result, Toy


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an image runs at one scale.

    `seen` are the earlier scales whose keys it reads. `kept` tokens run, `guided` ones of them in the unconditional
    branch too. Elsewhere the difference of scale `source` guides, times `weight`, or that of `guided` ones around,
    if it is spread. Tokens that do not run commit zero, or soft bits if logits are spread.
    """

    seen: tuple[int, ...]
    kept: tuple[int, ...]
    guided: tuple[int, ...]
    source: int | None = None
    weight: float = 0.0
    spread: Spread | None = None
    spread_difference: SpreadDifference | None = None


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


def around(values: dict[int, Tensor], input_Zhw: Tensor, sigma: float, likeness: float) -> dict[int, Tensor]:
    """For every token the weighted mean of the values within three steps of it, itself left out; float64.

    Tokens without one are missing.
    """
    input_Zhw, (h, w) = input_Zhw.double(), input_Zhw.shape[1:]
    columns = [input_Zhw[:, t // w, t % w] for t in range(h * w)]
    centre = sum(columns) / len(columns)
    variance = sum(float(((c - centre) ** 2).sum()) for c in columns) / len(columns)
    means = {}
    for token in range(h * w):
        total, weights = 0.0, 0.0
        for other, value in values.items():
            dy, dx = other // w - token // w, other % w - token % w
            if other == token or max(abs(dy), abs(dx)) > 3:
                continue
            unlike = float(((columns[token] - columns[other]) ** 2).sum())
            weight = math.exp(-(dy**2 + dx**2) / (2 * sigma**2))
            weight *= math.exp(-unlike / (2 * likeness**2 * variance)) if variance else 1.0
            total, weights = total + weight * value.double(), weights + weight
        if weights:
            means[token] = total / weights
    return means


def trust(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """<true, estimate> / <estimate, estimate> between 0 and 1."""
    agreed = sum(float((true.double() * estimate).sum()) for true, estimate in pairs)
    size = sum(float((estimate**2).sum()) for _, estimate in pairs)
    return min(max(agreed / size, 0.0), 1.0) if size else 0.0


def soft_signs(
    word: Spread, logits: Tensor, bits: Tensor, kept: Sequence[int], input_Zhw: Tensor, u: Sequence[float], rule
) -> dict[int, Tensor]:
    """Soft codes of the tokens that did not run, in [-1, 1]; bit by bit."""
    num_bits = bits.shape[-1]
    own = {token: row.unflatten(-1, (-1, 2)).double() for token, row in zip(kept, logits, strict=True)}
    margins = around({t: pair[:, 1] - pair[:, 0] for t, pair in own.items()}, input_Zhw, word.sigma, word.likeness)
    signs = {}
    for token, margin_d in margins.items():
        signs[token] = torch.zeros(num_bits, dtype=torch.float64)
        for bit, margin in enumerate(margin_d.tolist()):
            number = u[token * num_bits + bit]
            p = filtered([0.0, margin], 0, rule.top_p)[1]
            if rule.top_k == 1:
                excess = margin
            elif p in (0.0, 1.0):
                excess = math.inf if p else -math.inf
            else:
                excess = margin - math.log(number / (1 - number))
            signs[token][bit] = math.tanh(excess / (2 * word.softness))
    pairs = [(2.0 * row - 1.0, signs[t]) for t, row in zip(kept, bits, strict=True) if t in signs]
    confidence = trust(pairs)
    return {t: confidence * sign for t, sign in signs.items() if t not in kept}


def residual_of(
    toy: Toy, symbols_kd: Tensor, kept: Sequence[int], scale: int, soft: dict[int, Tensor] | None = None
) -> Tensor:
    """The codes of the tokens that ran; elsewhere soft codes where there are any, or zero; (1, Z, y, x)."""
    grid, patch = toy.schedule.grids[scale], toy.schedule.patch
    whole_ld = torch.zeros(grid[0] * grid[1], symbols_kd.shape[-1], dtype=torch.long)
    whole_ld[list(kept)] = symbols_kd
    residual_BZyx = toy.tokenizer.residual(whole_ld[None], grid)
    for token in set(range(len(whole_ld))) - set(kept):
        y, x = token // grid[1] * patch, token % grid[1] * patch
        residual_BZyx[..., y : y + patch, x : x + patch] = 0
        for index, sign in enumerate((soft or {}).get(token, torch.zeros(0)).tolist()):
            channel, inside = divmod(index, patch**2)
            value = sign * residual_BZyx.shape[1] ** -0.5
            residual_BZyx[0, channel, y + inside // patch, x + inside % patch] = value
    return residual_BZyx


def reads_inputs(toy: Toy) -> bool:
    """Whether a difference is one of head inputs: where they are no wider than the head's outputs."""
    return toy.model.shape.width <= toy.model.shape.head_outputs


def guided_logits(toy: Toy, cond_of: dict, uncond_of: dict, old_lW: Tensor | None, step: Step, w: float) -> Tensor:
    """Logits of the tokens that run, one after the other: w cond + (1 - w) uncond, or what stands for the latter."""
    head, rows, factor = toy.model.head_logits, [], step.weight if step.spread_difference is None else 1.0
    for token, c_C in cond_of.items():
        cond_1V = head(c_C[None])
        if token in uncond_of:
            rows.append(w * cond_1V + (1 - w) * head(uncond_of[token][None]))
        elif old_lW is None:
            rows.append(cond_1V)
        elif reads_inputs(toy):
            rows.append(w * cond_1V + (1 - w) * head((c_C - factor * old_lW[token])[None]))
        else:
            rows.append(w * cond_1V + (1 - w) * (cond_1V - factor * old_lW[token]))
    return torch.cat(rows)


def spread_difference(toy: Toy, word: SpreadDifference, cond_of: dict, uncond_of: dict, input_Zhw: Tensor) -> Tensor:
    """The difference of the branches on the whole grid, from the tokens that ran in both."""
    own = {}
    for token, u_C in uncond_of.items():
        parts = (
            (cond_of[token], u_C)
            if reads_inputs(toy)
            else map(toy.model.head_logits, (cond_of[token][None], u_C[None]))
        )
        a, b = (part.flatten() for part in parts)
        own[token] = a - b
    means = around(own, input_Zhw, word.sigma, word.likeness)
    confidence = trust([(own[token], means[token]) for token in own if token in means])
    map_lW = torch.zeros(input_Zhw.shape[1] * input_Zhw.shape[2], len(next(iter(own.values()))))
    for token, mean in means.items():
        map_lW[token] = (confidence * mean).float()
    return map_lW


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
        input_Zhw = toy.tokenizer.next_input(f_hat, grid)[0]
        if step.spread_difference is not None and uncond_of:
            old_lW = spread_difference(toy, step.spread_difference, cond_of, uncond_of, input_Zhw)
        logits = guided_logits(toy, cond_of, uncond_of, old_lW, step, request.guidance.weights[scale])
        logits = logits / request.temperatures[scale]
        rule, soft = request.filters[scale], None
        symbols = sample(logits, step.kept, num_tokens, SEEDS[image], scale, rule)
        if step.spread is not None and len(step.kept) < num_tokens:
            u = draw(SEEDS[image], scale, num_tokens * symbols.shape[-1])
            soft = soft_signs(step.spread, logits, symbols, step.kept, input_Zhw, u, rule)
        f_hat = toy.tokenizer.add(f_hat, residual_of(toy, symbols, step.kept, scale, soft), scale, num_scales)
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
