"""The training examples: an endless numbered sequence of scenes, of which a window is encoded at any time.

Scene k follows from the seed and k alone, and the window from the number of the step: a run that was stopped goes on
with the same examples. A scene stays for a while, as a CPU encodes images more slowly than it wants them: it is used
several times, each time with other flipped bits and another alteration of its text.
Axes: B images, N images of the corpus, Z latent channels, K backgrounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from foveate.core.transfer import to_device
from recipes.emoji.captions import Drawing
from recipes.emoji.scenes import Scene, SceneConfig, draw_scene, render

BLOCK = 32
"""Scenes that are encoded together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSequence:
    """Scenes by number.

    Attributes:
        drawings: What they are composed of, one split of a corpus.
        images_NYXc: All images of the corpus, on the device that renders.
        config: Shares of kinds and colours.
        weights: How often each of `drawings` is chosen.
        contrast_NK: See `contrast.rim_contrast`.
        size: Height and width of the images in pixels.
        seed: Where the sequence begins.
    """

    drawings: Sequence[Drawing]
    images_NYXc: UInt8[Tensor, "N Y X 4"]
    config: SceneConfig
    weights: Float[np.ndarray, " n"]
    contrast_NK: Float[np.ndarray, "N K"]
    size: tuple[int, int]
    seed: int = 0

    def scenes(self, first: int, count: int) -> list[Scene]:
        """The scenes number `first` to `first + count - 1`."""
        return [
            draw_scene(
                self.drawings,
                np.random.default_rng([self.seed, number]),
                self.config,
                weights=self.weights,
                contrast_NK=self.contrast_NK,
            )
            for number in range(first, first + count)
        ]

    def pixels(self, scenes: Sequence[Scene]) -> Float[Tensor, "B 3 Y X"]:
        """Renders scenes, in [-1, 1]."""
        return render(scenes, self.images_NYXc, self.size)


class Window:
    """The encoded scenes that a step of the transformer may draw from."""

    def __init__(
        self,
        sequence: SceneSequence,
        encode_pixels: Callable[[Tensor], Tensor],
        encode_texts: Callable[[list[str]], Sequence[Tensor]],
        *,
        size: int,
    ) -> None:
        self.sequence, self.encode_pixels, self.encode_texts = sequence, encode_pixels, encode_texts
        self.size = max(BLOCK, size // BLOCK * BLOCK)
        self._end = 0
        self._latents_nZHW: Tensor | None = None
        self._texts: list[Tensor] = []

    def batch(
        self, progress: float, batch: int, rng: np.random.Generator
    ) -> tuple[Float[Tensor, "B Z H W"], list[Tensor]]:
        """Latents and text features for one step.

        Args:
            progress: Number of the scene that the window has moved to, up to a block.
            batch: Number of examples.
            rng: Chooses among the window.
        """
        self._move(int(progress) // BLOCK * BLOCK)
        chosen = rng.integers(0, self.size, batch)
        assert self._latents_nZHW is not None
        index = to_device(torch.from_numpy(chosen), self._latents_nZHW.device)
        return self._latents_nZHW[index], [self._texts[i] for i in chosen]

    def _move(self, first: int) -> None:
        """Encodes what is missing up to the window's new end; scene k lies at k modulo the window's size."""
        self._end = max(self._end, first)
        while self._end < first + self.size:
            scenes = self.sequence.scenes(self._end, BLOCK)
            with torch.no_grad():
                latents_BZHW = self.encode_pixels(self.sequence.pixels(scenes))
            if self._latents_nZHW is None:
                self._latents_nZHW = latents_BZHW.new_empty((self.size, *latents_BZHW.shape[1:]))
                self._texts = [latents_BZHW.new_empty(0)] * self.size
            at = self._end % self.size
            self._latents_nZHW[at : at + BLOCK] = latents_BZHW
            self._texts[at : at + BLOCK] = self.encode_texts([scene.caption for scene in scenes])
            self._end += BLOCK
