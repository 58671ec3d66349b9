"""Figures of a model's tokenizer: reconstructions, and what its bits are worth.

Axes: n images, Y = X pixels, Z latent channels, s scales.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from foveate.core.schedule import Grid
from foveate.eval.fidelity import foreground_psnr, psnr, ssim
from foveate.tokenizers.bsq import quantise
from recipes.emoji.bits import (
    FLAT_RANGE,
    RARE,
    area_entropy,
    bit_entropy,
    bit_means,
    bits_in_use,
    flat_tokens,
)
from recipes.emoji.captions import Drawing
from recipes.emoji.corpus import Corpus
from recipes.emoji.figures import Figure
from recipes.emoji.scenes import Kind, Scene

Images = UInt8[np.ndarray, "n Y X 3"]
BATCH = 8


@runtime_checkable
class Encoding(Protocol):
    """What is measured here: a corpus, scenes of it, and a tokenizer."""

    corpus: Corpus
    num_prompts: int

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The scales."""
        ...

    def on_white(self, drawings: Sequence[Drawing]) -> Images:
        """Drawings on white."""
        ...

    def scenes(self, kind: Kind, count: int) -> list[Scene]:
        """Scenes of one kind."""
        ...

    def real(self, scenes: Sequence[Scene]) -> Images:
        """Rendered scenes."""
        ...

    def encoded(self, images: Images) -> Float[Tensor, "n Z H W"]:
        """Continuous latents in float32."""
        ...

    def rebuilt(self, images: Images) -> Images:
        """Reconstructions."""
        ...


def tokenizer_figures(examined: Encoding) -> Iterator[Figure]:
    """How near reconstructions are to drawings of both splits and to scenes."""
    for split, name in (("train", "drawings trained on"), ("test", "drawings held out")):
        drawings = spread(examined.corpus.split(split), examined.num_prompts)
        if not drawings:
            yield Figure(name=f"tokenizer, {name}", value=None, note="the corpus has no held-out split")
            continue
        images = examined.on_white(drawings)
        again = examined.rebuilt(images)
        is_goal = split == "test"
        yield Figure(
            name=f"tokenizer PSNR dB, {name}",
            value=float(psnr(again, images).mean()),
            target=29.5 if is_goal else None,
            is_share=False,
        )
        yield Figure(
            name=f"tokenizer SSIM, {name}",
            value=float(ssim(again, images).mean()),
            target=0.95 if is_goal else None,
            is_share=False,
        )
        yield Figure(
            name=f"tokenizer PSNR dB without white, {name}",
            value=float(foreground_psnr(again, images).mean()),
            is_share=False,
        )
    real = examined.real(examined.scenes("beside", min(examined.num_prompts, 64)))
    yield Figure(
        name="tokenizer PSNR dB, two things",
        value=float(psnr(examined.rebuilt(real), real).mean()),
        target=28.5,
        is_share=False,
    )


def bit_figures(examined: Encoding) -> Iterator[Figure]:
    """Which bits vary, and their entropy on every scale: on all tokens, on flat areas and on textured ones."""
    images = examined.real(examined.scenes("single", min(examined.num_prompts, 128)))
    parts = [
        quantise(examined.encoded(images[first : first + BATCH]), examined.grids).bits
        for first in range(0, len(images), BATCH)
    ]
    bits = [torch.cat(scale).cpu().numpy() for scale in zip(*parts, strict=True)]
    means_sZ = bit_means(bits)
    used_s, entropy_s = bits_in_use(means_sZ), bit_entropy(means_sZ)
    yield Figure(
        name="bits in use",
        value=float(used_s.mean()),
        target=0.95,
        note=f"per scale and channel, those that are 1 in {RARE:.0%} to {1 - RARE:.0%} of all tokens",
    )
    yield Figure(name="entropy per bit", value=float(entropy_s.mean()), is_share=False, note="in bits, 1 at most")
    for grid, scale, used, entropy in zip(examined.grids, bits, used_s, entropy_s, strict=True):
        where = f"scale of {grid[0]} x {grid[1]}"
        yield Figure(name=f"bits in use, {where}", value=float(used), note=f"entropy per bit {entropy:.3f}")
        is_flat_nhw = flat_tokens(images, grid)
        for area, is_in_nhw in (("flat", is_flat_nhw), ("textured", ~is_flat_nhw)):
            note = f"{is_in_nhw.mean():.0%} of the tokens"
            if area == "flat":
                note += f": their pixels differ by at most {FLAT_RANGE} of 255"
            yield Figure(
                name=f"entropy per bit on {area} areas, {where}",
                value=area_entropy(scale, is_in_nhw),
                is_share=False,
                note=note,
            )


def spread(drawings: Sequence[Drawing], count: int) -> list[Drawing]:
    """At most so many, evenly spread."""
    count = min(count, len(drawings))
    return [drawings[int(i * len(drawings) / count)] for i in range(count)]
