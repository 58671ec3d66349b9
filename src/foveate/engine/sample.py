"""From logits to symbols: keyed draws, the published order of draws, greedy, and forced symbols.

Keyed draws depend on (seed, scale, position) alone: not on the batch, on what a policy skipped, or on the device.
A symbol is a bit (V = 2) or an id (V = codebook size); a token holds d of them.
Axes: B images, k tokens that ran, l tokens of the scale, d symbols, V values.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.core.transfer import to_device
from foveate.kernels import draws
from foveate.kernels.bits import keep_two, sample_bits

SAMPLE_STREAM, SMOOTH_STREAM = 0, 1
"""Philox streams of a scale: of its codes, and of smoothing."""
_STREAMS = 256
"""Streams that a scale may have."""

NUM_BIT_VALUES = 2
"""Values of a symbol that is a bit."""


def keyed_uniform(seed: int, scale: int, shape: Sequence[int], stream: int = SAMPLE_STREAM) -> Float[np.ndarray, "..."]:
    """Uniform draws of a whole map, float32 inside (0, 1), the same on every machine.

    Philox keyed by (seed, 256 * scale + stream), in C order over `shape`; see `kernels.draws`.
    """
    return draws.uniform((seed, _STREAMS * scale + stream), shape)


def keyed_exponential(
    seed: int, scale: int, shape: Sequence[int], stream: int = SAMPLE_STREAM
) -> Float[np.ndarray, "..."]:
    """`-log(u)` of the draws of `keyed_uniform`, float32: the log is taken on the host, in float64."""
    return draws.exponential((seed, _STREAMS * scale + stream), shape)


def filtered(logits_kdV: Float[Tensor, "k d V"], top_k: int, top_p: float) -> Float[Tensor, "k d V"]:
    """Float32 logits with -inf where top-k (ties with the k-th stay) or top-p (the best always stays) rule a value out.

    `top_k` and `top_p` of 0 switch the filters off.
    """
    logits_kdV = logits_kdV.float()
    num_values = logits_kdV.shape[-1]
    if 0 < top_k < num_values:
        kth = logits_kdV.topk(top_k, dim=-1).values[..., -1:]
        logits_kdV = logits_kdV.masked_fill(logits_kdV < kth, -torch.inf)
    if top_p > 0 and num_values == NUM_BIT_VALUES:
        logits_kdV = keep_two(logits_kdV, top_p)
    elif top_p > 0:
        ascending, order = logits_kdV.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits_kdV = logits_kdV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return logits_kdV


def probabilities(logits_kdV: Float[Tensor, "k d V"], top_k: int, top_p: float) -> Float[Tensor, "k d V"]:
    """Softmax of the filtered logits, float32."""
    return filtered(logits_kdV, top_k, top_p).softmax(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Top-k and top-p of one scale; 0 switches a filter off and `top_k` = 1 is greedy."""

    top_k: int
    top_p: float

    @property
    def is_greedy(self) -> bool:
        """Whether the best symbol is always taken."""
        return self.top_k == 1


class Sampler(ABC):
    """Chooses the symbols of every token of a scale; may own random state, so one serves one request."""

    def state(self) -> Tensor | None:
        """The random state, to be given to `restore` if a scale fails; None where there is none."""
        return None

    def restore(self, state: Tensor | None) -> None:
        """Goes back to a state; does nothing where there is none."""
        return

    def seed_of(self, image: int) -> int | None:
        """The seed of an image's keyed draws; None where draws have an order instead."""
        return None

    def thresholds(self, scale: int, grid: Grid, num_images: int, num_bits: int) -> list[Float[Tensor, "l d"]] | None:
        """Per image, on the host, what each bit of the map is drawn against: it is 1 where log(p1 / p0) is larger.

        Leaves the random state as it is: asked for before `choose`. None where symbols are not drawn.
        """
        return None

    def generator_of(self) -> torch.Generator | None:
        """What later draws of the published order come from; None where draws are keyed."""
        return None

    def choose_with_draws(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> tuple[Sequence[Tensor], Sequence[Int[Tensor, "_k d"]]]:
        """As `choose`, and the symbols that were drawn: the same, where none are mixed."""
        symbols = self.choose(scale, grid, logits, kept, rule)
        return symbols, symbols

    @abstractmethod
    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "_k d"]] | list[Float[Tensor, "_k V"]]:
        """Symbols of each image's tokens that ran, or weights of all values (soft symbols).

        Args:
            scale: Index in the full schedule.
            grid: Token grid of the scale.
            logits: Per image, after guidance and temperature.
            kept: Per image, the tokens' positions in the grid; None if all ran.
            rule: Filters.
        """


def _take(noise_ld: Tensor, kept: Sequence[Tensor] | None, image: int) -> Tensor:
    return noise_ld if kept is None else noise_ld[kept[image]]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyedSampler(Sampler):
    """Draws keyed by (seed, scale, position); one seed per image."""

    seeds: tuple[int, ...]

    def seed_of(self, image: int) -> int:
        """Its seed."""
        return self.seeds[image]

    def thresholds(self, scale: int, grid: Grid, num_images: int, num_bits: int) -> list[Float[Tensor, "l d"]]:
        """log(u / (1 - u)), in float64 and then float32."""
        maps = [keyed_uniform(seed, scale, (*grid, num_bits)).astype(np.float64) for seed in self.seeds]
        return [torch.from_numpy(np.log(u) - np.log1p(-u)).float().flatten(0, 1) for u in maps]

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "_k d"]]:
        """Bit = u < p1; id = argmax(p / -log u)."""
        chosen = []
        for image, logits_kdV in enumerate(logits):
            if rule.is_greedy:
                chosen.append(logits_kdV.argmax(-1))
                continue
            num_symbols, num_values = logits_kdV.shape[1:]
            if num_values == NUM_BIT_VALUES:
                u_ld = torch.from_numpy(keyed_uniform(self.seeds[image], scale, (*grid, num_symbols))).flatten(0, 1)
                u_kd = _take(to_device(u_ld, logits_kdV.device), kept, image)
                chosen.append(sample_bits(logits_kdV, u_kd, rule.top_p))
            else:
                e_lV = torch.from_numpy(keyed_exponential(self.seeds[image], scale, (*grid, num_values))).flatten(0, 1)
                p_kdV = probabilities(logits_kdV, rule.top_k, rule.top_p)
                e_kV = _take(to_device(e_lV, p_kdV.device), kept, image)
                chosen.append((p_kdV / e_kV[:, None]).argmax(-1))
        return chosen

    def exponentials(self, scale: int, grid: Grid, num_images: int, num_values: int) -> list[Float[Tensor, "l V"]]:
        """Each image's exponential draws for smoothing, of the whole grid, on the host."""
        maps = (keyed_exponential(seed, scale, (*grid, num_values), SMOOTH_STREAM) for seed in self.seeds)
        return [torch.from_numpy(e).flatten(0, 1) for e in maps]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceSampler(Sampler):
    """One generator for the whole batch, in the published order: seeds of the reference code reproduce.

    `multinomial(p, 1)` is argmax(p / e) with exponentials drawn from the same generator; they are drawn for all tokens,
    also for those that a policy dropped.
    """

    generator: torch.Generator

    def state(self) -> Tensor:
        """That of the generator."""
        return self.generator.get_state()

    def restore(self, state: Tensor | None) -> None:
        """Sets the generator back."""
        if state is not None:
            self.generator.set_state(state)

    def thresholds(self, scale: int, grid: Grid, num_images: int, num_bits: int) -> list[Float[Tensor, "l d"]]:
        """log(e1 / e0) of the exponentials that `choose` is about to draw."""
        state = self.state()
        e_BldV = self._exponentials(num_images, grid[0] * grid[1], num_bits, NUM_BIT_VALUES).double().cpu()
        self.restore(state)
        return list((e_BldV[..., 1].log() - e_BldV[..., 0].log()).float())

    def generator_of(self) -> torch.Generator:
        """The generator."""
        return self.generator

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "_k d"]]:
        """Draws (B * l * d, V) exponentials, also when greedy."""
        e_BldV = self._exponentials(len(logits), grid[0] * grid[1], *logits[0].shape[1:])
        chosen = []
        for image, logits_kdV in enumerate(logits):
            p_kdV = probabilities(logits_kdV, rule.top_k, rule.top_p)
            chosen.append((p_kdV / _take(to_device(e_BldV[image], p_kdV.device), kept, image)).argmax(-1))
        return chosen

    def _exponentials(
        self, num_images: int, num_tokens: int, num_symbols: int, num_values: int
    ) -> Float[Tensor, "B l d V"]:
        e = torch.empty(
            num_images * num_tokens * num_symbols, num_values, dtype=torch.float32, device=self.generator.device
        )
        return e.exponential_(1.0, generator=self.generator).view(num_images, num_tokens, num_symbols, num_values)

    def exponentials(self, scale: int, grid: Grid, num_images: int, num_values: int) -> list[Float[Tensor, "l V"]]:
        """Exponential draws for smoothing, of all images at once."""
        e = torch.empty(num_images, grid[0] * grid[1], num_values, dtype=torch.float32, device=self.generator.device)
        return list(e.exponential_(1.0, generator=self.generator))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SmoothSampler(Sampler):
    """Mixes codes by a sharp Gumbel softmax instead of choosing one: softer images, for demonstrations.

    Scales outside of `first` up to `end` choose as `inner` does. Where `is_after_draw` ids are drawn first and filters
    act on the mixture too (VAR), elsewhere neither (Switti). Where it `holds_last` the last scale is as sharp as the
    one before it (HART). Returns weights (k, V) of all codes.
    Source: the published samplers of VAR, Switti and HART (`more_smooth`).
    """

    inner: KeyedSampler | ReferenceSampler
    num_scales: int
    first: int
    end: int
    is_after_draw: bool
    holds_last: bool = False

    def state(self) -> Tensor | None:
        """That of the inner sampler."""
        return self.inner.state()

    def restore(self, state: Tensor | None) -> None:
        """Sets the inner sampler back."""
        self.inner.restore(state)

    def seed_of(self, image: int) -> int | None:
        """That of the inner sampler."""
        return self.inner.seed_of(image)

    def generator_of(self) -> torch.Generator | None:
        """That of the inner sampler."""
        return self.inner.generator_of()

    def choose_with_draws(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> tuple[Sequence[Tensor], Sequence[Int[Tensor, "_k d"]]]:
        """Soft symbols, and the ids that were drawn before them."""
        drawn = self.inner.choose(scale, grid, logits, kept, rule)
        return self._mixed(scale, grid, logits, kept, rule) if self.first <= scale < self.end else drawn, drawn

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "_k d"]] | list[Float[Tensor, "_k V"]]:
        """Softmax of (progress-scaled logits + Gumbel noise) over a temperature that falls from .27 to .0135."""
        if not self.first <= scale < self.end:
            return self.inner.choose(scale, grid, logits, kept, rule)
        if self.is_after_draw and isinstance(self.inner, ReferenceSampler):
            # The ids go nowhere, but the generator has to advance; keyed draws depend on no other draw.
            self.inner.choose(scale, grid, logits, kept, rule)
        return self._mixed(scale, grid, logits, kept, rule)

    def _mixed(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Float[Tensor, "_k V"]]:
        """Weights of all codes."""
        last = max(self.num_scales - 1, 1)
        progress = min(scale, last - 1 if self.holds_last else last) / last
        sharpness = max(0.27 * (1 - 0.95 * progress), 0.005)
        mixed = []
        for image, e_lV in enumerate(self.inner.exponentials(scale, grid, len(logits), logits[0].shape[-1])):
            x_kdV = filtered(logits[image], rule.top_k, rule.top_p) if self.is_after_draw else logits[image].float()
            gumbel_kV = -_take(to_device(e_lV, x_kdV.device), kept, image).log()
            mixed.append(((x_kdV.squeeze(1) * (1 + progress) + gumbel_kV) / sharpness).softmax(-1))
        return mixed


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForcedSampler(Sampler):
    """Symbols that are given for every scale, (B, l, d) each: for parity and for editing."""

    symbols: tuple[Int[Tensor, "B _l d"], ...]

    def choose(
        self,
        scale: int,
        grid: Grid,
        logits: Sequence[Float[Tensor, "_k d V"]],
        kept: Sequence[Int[Tensor, " _k"]] | None,
        rule: Filter,
    ) -> list[Int[Tensor, "_k d"]]:
        """Returns what was given."""
        device = logits[0].device
        return [
            _take(to_device(symbols_ld, device), kept, image) for image, symbols_ld in enumerate(self.symbols[scale])
        ]
