"""The oracle: what an image loses if the last scales commit only some of their tokens, all codes being the true ones.

    python -m recipes.emoji oracle RUN/corpus --tokenizer RUN/autoencoder.safetensors --choice energy:0.5,0.3:zero

No transformer runs, so a new rule or fill is tried on a tokenizer in seconds. The codes are those of the whole image;
a rule reads what the policies read, the previous residual and the latent so far, with the fills of earlier scales in
them. What a transformer that draws its codes makes of it is another question: see the policies' pages.

Axes: B images, Z latent channels, (h, w) the grid of a scale, (H, W) the last grid, l tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import FoveateError, unknown
from foveate.core.schedule import Grid
from foveate.core.selection import keep_by_count, keep_by_mass
from foveate.engine.fills import nearest_ran
from foveate.eval.fidelity import psnr
from foveate.pipeline.output import to_uint8
from foveate.policies.ld_pruning import detail_energy, share_of_mean
from foveate.tokenizers.accumulate import resize, shrink
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.bsq import bits_to_codes, quantise
from foveate.weights.files import read_weights
from foveate.weights.folder import read_network
from foveate.weights.infinity import infer_autoencoder_config, load_autoencoder
from recipes.emoji.corpus import Corpus
from recipes.emoji.tokenizer import composite
from recipes.emoji.tokens import spread

BATCH = 8
LATTICE = 3
"""Every so many rows and columns hold a token that "energy-lattice" keeps in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a rule may read before a scale: the latent so far, the previous scale's residual, the grid, its index."""

    f_hat_BZHW: Float[Tensor, "B Z H W"]
    residual_BZhw: Float[Tensor, "B Z _h _w"]
    grid: Grid
    scale: int


def _energy(seen: Seen) -> Float[Tensor, "B l"]:
    grid = (seen.residual_BZhw.shape[-2], seen.residual_BZhw.shape[-1])
    return _fine_energy(replace(seen, f_hat_BZHW=shrink(seen.f_hat_BZHW, grid)))


def _fine_energy(seen: Seen) -> Float[Tensor, "B l"]:
    maps = (detail_energy(one, seen.grid) for one in (seen.residual_BZhw, seen.f_hat_BZHW))
    return torch.stack([share_of_mean(energy_Byx) for energy_Byx in maps]).sum(0).flatten(1)


def _residual_energy(seen: Seen) -> Float[Tensor, "B l"]:
    return detail_energy(seen.residual_BZhw, seen.grid).flatten(1)


def _random(seen: Seen) -> Float[Tensor, "B l"]:
    rng = np.random.default_rng(seen.scale)
    return torch.from_numpy(rng.random((len(seen.f_hat_BZHW), math.prod(seen.grid))))


def _row_and_column(grid: Grid) -> tuple[Tensor, Tensor]:
    y_hw, x_hw = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return y_hw.flatten(), x_hw.flatten()


def _checkerboard(seen: Seen) -> Float[Tensor, "B l"]:
    y_l, x_l = _row_and_column(seen.grid)
    return ((y_l + x_l) % 2 == 0).double().expand(len(seen.f_hat_BZHW), -1)


def _energy_and_lattice(seen: Seen) -> Float[Tensor, "B l"]:
    y_l, x_l = _row_and_column(seen.grid)
    is_on_l = (y_l % LATTICE == 0) & (x_l % LATTICE == 0)
    return _energy(seen).masked_fill(is_on_l, torch.inf)


RULES: dict[str, Callable[[Seen], Float[Tensor, "B l"]]] = {
    "mass": _residual_energy,
    "residual": _residual_energy,
    "energy": _energy,
    "energy-fine": _fine_energy,
    "energy-lattice": _energy_and_lattice,
    "checkerboard": _checkerboard,
    "random": _random,
}
"""Scores of tokens. "mass" keeps a share of the energy, as LD-Pruning does; the others keep a share of the tokens.

"energy" adds the latent's to the residual's, on the residual's grid, as `energy_of` of LD-Pruning does; "energy-fine"
reads the latent on its own grid.
"""

FILLS = ("zero", "previous", "nearest", "half-nearest")
"""What the other tokens commit: nothing, the previous residual, or (half of) the code of the nearest token kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A rule with its shares of the last `len(shares)` scales, and a fill; a share of 0 deletes a scale."""

    rule: str
    shares: tuple[float, ...]
    fill: str

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.rule not in RULES:
            raise unknown("rule", self.rule, tuple(RULES))
        if self.fill not in FILLS:
            raise unknown("fill", self.fill, FILLS)
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise FoveateError(f"shares must be in [0, 1], one for each of the last scales, got {self.shares}")

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Reads RULE:SHARE,SHARE,...:FILL, for example energy:0.7,0.5,0.3:zero.

        Raises:
            FoveateError: It is not written so.
        """
        parts = text.split(":")
        try:
            rule, shares, fill = parts
            return cls(rule=rule, shares=tuple(float(share) for share in shares.split(",")), fill=fill)
        except ValueError as error:
            if isinstance(error, FoveateError):
                raise
            raise FoveateError(f"a choice is RULE:SHARE,SHARE,...:FILL, got {text!r}") from None

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.rule}:{','.join(f'{share:g}' for share in self.shares)}:{self.fill}"


DEFAULT_CHOICES = (
    "random:0:zero", "random:0,0:zero", "random:0,0,0:zero",
    "mass:0.5,0.5,0.5:previous", "mass:0.5,0.5,0.5:zero", "mass:0.5:previous", "mass:0.5:zero",
    "random:0.5,0.5,0.5:zero", "random:0.5:zero", "checkerboard:0.5:zero", "energy-fine:0.5:zero",
    "random:0.7,0.7:zero", "residual:0.7,0.7:zero", "energy:0.7,0.7:zero", "energy-fine:0.7,0.7:zero",
    "energy-fine:0.7,0.7,0.7:zero", "energy-lattice:0.7,0.7,0.7:nearest",
    "energy:0.5,0.3:zero", "energy-fine:0.5,0.3:zero", "energy:0.5,0.3:half-nearest",
    "energy:0.7,0.5,0.3:zero", "energy:0.5,0.3,0:zero",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a choice did to some images.

    Attributes:
        images: Decoded, uint8.
        kept: Share of the tokens of the last scales that were kept.
        kept_of_all: The same of all scales.
    """

    images: UInt8[np.ndarray, "B Y X 3"]
    kept: float
    kept_of_all: float


class Oracle:
    """A tokenizer, and images with their true codes."""

    def __init__(self, autoencoder: Autoencoder, grids: Sequence[Grid], pixels: Float[Tensor, "B 3 Y X"]) -> None:
        self.autoencoder, self.grids = autoencoder, tuple(grids)
        with torch.no_grad():
            latents = [autoencoder.encode(part).float() for part in pixels.split(BATCH)]
        bits = quantise(torch.cat(latents), self.grids).bits
        self.codes = tuple(bits_to_codes(bits_BhwZ) for bits_BhwZ in bits)
        self.full = self.decode(torch.stack([resize(codes, self.grids[-1]) for codes in self.codes]).sum(0))

    def decode(self, f_hat_BZHW: Float[Tensor, "B Z H W"]) -> UInt8[np.ndarray, "B Y X 3"]:
        """Images of latents."""
        with torch.no_grad():
            return np.concatenate([to_uint8(self.autoencoder.images(part)) for part in f_hat_BZHW.split(BATCH)])

    def run(self, choice: Choice) -> Outcome:
        """Commits all scales, the last ones as the choice says.

        Raises:
            FoveateError: The choice has as many shares as the schedule has scales, or more.
        """
        first = len(self.grids) - len(choice.shares)
        if first < 1:
            raise FoveateError(f"shares must be fewer than the {len(self.grids)} scales, got {len(choice.shares)}")
        f_hat_BZHW = torch.zeros_like(self.codes[-1])
        residual_BZhw, kept = self.codes[0], 0.0
        for scale, codes_BZhw in enumerate(self.codes):
            share = choice.shares[scale - first] if scale >= first else 1.0
            if share < 1:
                seen = Seen(f_hat_BZHW=f_hat_BZHW, residual_BZhw=residual_BZhw, grid=self.grids[scale], scale=scale)
                keep_Bl = keep(choice.rule, share, seen)
                residual_BZhw = filled(codes_BZhw, keep_Bl, residual_BZhw, choice.fill, share)
                kept += float(keep_Bl.sum() / len(keep_Bl))
            else:
                residual_BZhw = codes_BZhw
                kept += math.prod(self.grids[scale]) * (scale >= first)
            f_hat_BZHW = f_hat_BZHW + resize(residual_BZhw, self.grids[-1])
        earlier, late = (sum(map(math.prod, part)) for part in (self.grids[:first], self.grids[first:]))
        return Outcome(
            images=self.decode(f_hat_BZHW), kept=kept / late, kept_of_all=(earlier + kept) / (earlier + late)
        )


def keep(rule: str, share: float, seen: Seen) -> Bool[Tensor, "B l"]:
    """Which tokens of a scale a rule keeps."""
    score_Bl = RULES[rule](seen)
    if share == 0:
        return torch.zeros_like(score_Bl, dtype=torch.bool)
    if rule == "mass":
        return keep_by_mass(score_Bl, share)
    return keep_by_count(score_Bl, math.ceil(share * score_Bl.shape[1] - 1e-9))


def filled(
    codes_BZhw: Float[Tensor, "B Z h w"],
    keep_Bl: Bool[Tensor, "B l"],
    previous_BZhw: Float[Tensor, "B Z _h _w"],
    fill: str,
    share: float,
) -> Float[Tensor, "B Z h w"]:
    """A scale's residual: the codes of kept tokens, the fill elsewhere; nothing at all where a scale is deleted."""
    grid = (codes_BZhw.shape[-2], codes_BZhw.shape[-1])
    if fill == "zero" or share == 0:
        other_BZhw = torch.zeros_like(codes_BZhw)
    elif fill == "previous":
        other_BZhw = functional.interpolate(previous_BZhw, size=grid, mode="nearest")
    else:
        source_Bl = nearest_ran(keep_Bl, grid)
        codes_BZl = codes_BZhw.flatten(2)
        other_BZhw = codes_BZl.gather(2, source_Bl[:, None].expand_as(codes_BZl)).unflatten(-1, grid)
        other_BZhw = other_BZhw * (0.5 if fill == "half-nearest" else 1.0)
    return torch.where(keep_Bl.unflatten(-1, grid)[:, None], codes_BZhw, other_BZhw)


def read_autoencoder(path: Path) -> Autoencoder:
    """Reads an autoencoder of any shape, in float32."""
    config = infer_autoencoder_config(read_weights(path))
    return read_network(path, lambda: Autoencoder(config), load_autoencoder, torch.float32, torch.device("cpu"))


def of_drawings(autoencoder: Autoencoder, grids: Sequence[Grid], corpus: Corpus, count: int) -> Oracle:
    """An oracle on drawings of the training split, evenly spread, on white.

    Raises:
        FoveateError: The images of the corpus are of another size than the schedule.
    """
    side, wanted = corpus.images_NYXc.shape[1], tuple(n * autoencoder.config.stride for n in grids[-1])
    if wanted != (side, side):
        raise FoveateError(f"the corpus must have images of {wanted[0]} x {wanted[1]} pixels, got {side} x {side}")
    rows = [one.index for one in spread(corpus.split("train"), count)]
    return Oracle(autoencoder, grids, composite(np.ascontiguousarray(corpus.images_NYXc[rows])))


def table(oracle: Oracle, choices: Sequence[Choice]) -> str:
    """One line per choice: tokens kept, and PSNR to the full reconstruction."""
    lines = ["| rule, shares of the last scales, fill | their tokens kept | of all | PSNR dB | p10 |", "|---" * 5 + "|"]
    for choice in choices:
        outcome = oracle.run(choice)
        psnr_n = psnr(outcome.images, oracle.full)
        mean, p10 = float(psnr_n.mean()), float(np.percentile(psnr_n, 10))
        lines.append(f"| {choice} | {outcome.kept:.2f} | {outcome.kept_of_all:.2f} | {mean:.1f} | {p10:.1f} |")
    return "".join(f"{line}\n" for line in lines)
