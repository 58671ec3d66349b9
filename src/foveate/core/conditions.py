"""What an image is asked for, in the form that a model reads: token features, with a vector or positions, or a class.

Axes: T text tokens, E text width, F width of the pooled vector.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PooledText:
    """A prompt as token features at its real length, and one vector that stands for all of it."""

    tokens_TE: Float[Tensor, "T E"]
    pooled_F: Float[Tensor, " F"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacedText:
    """A prompt as token features with a position each, padding included, for a model that masks none of it.

    Equal tokens at one position may be given once: the first one stands for `first_copies` of them.
    """

    tokens_TE: Float[Tensor, "T E"]
    positions: tuple[int, ...]
    first_copies: int = 1

    @classmethod
    def nothing(cls, tokens: int, width: int, device: torch.device) -> "PlacedText":
        """What stands for no prompt: so many tokens of zeros, all at position 0, in two."""
        count = min(tokens, 2)
        return cls(
            tokens_TE=torch.zeros(count, width, dtype=torch.float32, device=device),
            positions=(0,) * count,
            first_copies=max(tokens - 1, 1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLabel:
    """A class of a class-conditional model, by its index."""

    index: int


Condition = Tensor | PooledText | PlacedText | ClassLabel
"""One entry per image; a bare tensor holds token features (T, E)."""


def num_text_tokens(condition: Condition) -> int:
    """Text tokens that the transformer reads; a class has none."""
    if isinstance(condition, ClassLabel):
        return 0
    return int((condition if isinstance(condition, Tensor) else condition.tokens_TE).shape[0])
