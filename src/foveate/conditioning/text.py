"""What a pipeline asks of a conditioner, the one that reads classes, and stand-ins that need no weights.

Axes: T text tokens, E text width, F width of a pooled vector.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveate.conditioning.label import class_index
from foveate.core.conditions import ClassLabel, Condition, PooledText


@runtime_checkable
class Conditioner(Protocol):
    """Turns prompts into conditions, each prompt by itself."""

    def encode(self, prompts: list[str]) -> Sequence[Condition]:
        """One condition per prompt, text at its real length."""
        ...

    def num_cut(self, prompt: str) -> int:
        """Tokens at the end of a prompt that `encode` leaves out, as it is too long."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassNames:
    """Reads a prompt as the index or the name of a class."""

    num_classes: int

    def encode(self, prompts: list[str]) -> list[ClassLabel]:
        """The classes.

        Raises:
            FoveateError: No class or more than one has such a name; close ones are named.
        """
        return [ClassLabel(index=class_index(prompt, self.num_classes)) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """None."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomText:
    """Normal features keyed by the prompt: as many tokens as it has words, and two for the ends."""

    width: int
    max_tokens: int
    device: torch.device

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """The same features for the same prompt, on every machine."""
        return [self._encode_one(prompt) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Words behind the longest prompt."""
        return max(self._num_tokens(prompt) - self.max_tokens, 0)

    def _num_tokens(self, prompt: str) -> int:
        return len(prompt.split()) + 2

    def _encode_one(self, prompt: str) -> Float[Tensor, "T E"]:
        num_tokens = min(self._num_tokens(prompt), self.max_tokens)
        return _keyed_normal(prompt, (num_tokens, self.width), self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPooledText:
    """The same with a vector for the whole prompt, as from a pair of CLIP encoders."""

    tokens: RandomText
    pooled_width: int

    def encode(self, prompts: list[str]) -> list[PooledText]:
        """The same features for the same prompt, on every machine."""
        return [
            PooledText(
                tokens_TE=tokens_TE,
                pooled_F=_keyed_normal(f"pooled {prompt}", (self.pooled_width,), self.tokens.device),
            )
            for prompt, tokens_TE in zip(prompts, self.tokens.encode(prompts), strict=True)
        ]

    def num_cut(self, prompt: str) -> int:
        """Words behind the longest prompt."""
        return self.tokens.num_cut(prompt)


def _keyed_normal(text: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=np.uint64)
    draws = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draws).to(device)
