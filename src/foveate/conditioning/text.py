"""What a pipeline asks of a text encoder, and a stand-in that needs no weights.

Axes: T text tokens, E text width.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("foveate")


@runtime_checkable
class TextFeatures(Protocol):
    """Turns prompts into token features, each prompt by itself."""

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Float32 features (tokens, width) of each prompt, at its real length."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomText:
    """Normal features keyed by the prompt: as many tokens as it has words, and two for the ends."""

    width: int
    max_tokens: int
    device: torch.device

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """The same features for the same prompt, on every machine."""
        return [self._encode_one(prompt) for prompt in prompts]

    def _encode_one(self, prompt: str) -> Tensor:
        num_tokens = len(prompt.split()) + 2
        if num_tokens > self.max_tokens:
            logger.warning(
                "prompt of %d tokens is longer than %d: the last %d tokens were cut",
                num_tokens, self.max_tokens, num_tokens - self.max_tokens,
            )  # fmt: skip
        key = np.frombuffer(hashlib.sha256(prompt.encode()).digest()[:16], dtype=np.uint64)
        draws = np.random.Generator(np.random.Philox(key=key))
        features_TE = draws.standard_normal((min(num_tokens, self.max_tokens), self.width), dtype=np.float32)
        return torch.from_numpy(features_TE).to(self.device)
