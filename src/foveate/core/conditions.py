"""What an image is asked for, in the form that a model reads: token features, those with a pooled vector, or a class.

Axes: T text tokens, E text width, F width of the pooled vector.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PooledText:
    """A prompt as token features at its real length, and one vector that stands for all of it."""

    tokens_TE: Float[Tensor, "T E"]
    pooled_F: Float[Tensor, " F"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassLabel:
    """A class of a class-conditional model, by its index."""

    index: int


Condition = Tensor | PooledText | ClassLabel
"""One entry per image; a bare tensor holds token features (T, E)."""


def num_text_tokens(condition: Condition) -> int:
    """Text tokens that cross-attention sees; a class has none."""
    if isinstance(condition, ClassLabel):
        return 0
    return int((condition.tokens_TE if isinstance(condition, PooledText) else condition).shape[0])
