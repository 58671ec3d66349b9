"""Turns prompts into token features and a pooled vector with the two CLIP text encoders that Switti reads.

Axes: `B` one row, `T` text tokens, `E` text width (that of one encoder, then of both side by side), `F` pooled width.

Source: Radford et al., CLIP (arXiv:2103.00020), and Cherti et al., OpenCLIP (arXiv:2212.07143), used as in Voronov et
al., Switti (arXiv:2412.01819); the networks are the ones of transformers. Published code pads every prompt to 77 tokens
and masks the padding, by the second tokenizer, where the transformer reads it. CLIP is causal, so what stands behind a
prompt never reaches it: here a prompt runs at its real length, and the features are the same up to rounding. The pooled
vector is the second encoder's hidden state at the end token, behind the final norm and before any projection. Published
code mends broken Unicode first; tokenizer.json only normalises it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from foveate.conditioning.pretrained import cut_ids, device_of, freeze, read_pretrained
from foveate.core.conditions import PooledText
from foveate.core.errors import FoveateError

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_BIG_G = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"

CLIP_TOKENS = 77
"""Longest prompt of the published encoders, both ends included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipText:
    """One frozen CLIP text encoder with its tokenizer.

    Making one changes what it is given: gradients of `model` off, evaluation mode on, truncation and padding of
    `tokenizer` off. Nothing changes afterwards.

    Attributes:
        model: `transformers.CLIPTextModel`; features come out on its device.
        tokenizer: Adds the start token in front and the end token behind.
    """

    model: nn.Module
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        freeze(self.model, self.tokenizer)

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, both ends included."""
        config: Any = self.model.config
        return int(config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> "ClipText":
        """Reads an encoder from a folder or from the hub; an image encoder in it is left out.

        Raises:
            FoveateError: transformers is not installed.
            CheckpointError: A file or a weight is missing or damaged, or the hub gave nothing.
        """
        model, tokenizer = read_pretrained(
            "CLIPTextModel", name_or_path, dtype=dtype, device=device, local_files_only=local_files_only
        )
        return cls(model=model, tokenizer=tokenizer)

    @torch.no_grad()
    def features(self, ids: list[int]) -> tuple[Float[Tensor, "T E"], Float[Tensor, " E"]]:
        """The last hidden states and the one at the first end token, in float32."""
        out = self.model(input_ids=torch.tensor([ids], device=device_of(self.model)))
        return out.last_hidden_state[0].float(), out.pooler_output[0].float()


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPair:
    """Two CLIP text encoders that read the same prompt.

    Attributes:
        first: Gives the first channels of the token features.
        second: Gives the others, and the pooled vector.
    """

    first: ClipText
    second: ClipText

    def __post_init__(self) -> None:
        if self.first.max_tokens != self.second.max_tokens:
            raise FoveateError(
                "both CLIP encoders must read prompts of the same length, "
                f"got {self.first.max_tokens} and {self.second.max_tokens} tokens"
            )

    @classmethod
    def from_pretrained(
        cls,
        first: str | Path = CLIP_L,
        second: str | Path = CLIP_BIG_G,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> "ClipPair":
        """Reads both encoders from folders or from the hub, where the first call fetches them.

        Args:
            first: A folder with config.json, tokenizer.json and weights, or the name of a hub repository.
            second: The same.
            dtype: What the encoders compute in; the published code takes bfloat16.
            device: Where they compute.
            local_files_only: Whether the hub is not asked.

        Raises:
            FoveateError: transformers is not installed.
            CheckpointError: A file or a weight is missing or damaged, or the hub gave nothing.
        """
        read = (
            ClipText.from_pretrained(name, dtype=dtype, device=device, local_files_only=local_files_only)
            for name in (first, second)
        )
        return cls(first=next(read), second=next(read))

    def encode(self, prompts: list[str]) -> list[PooledText]:
        """Computes the features of each prompt.

        Every prompt runs by itself, without padding, so its features are the same bit for bit whatever it is batched
        with.

        Args:
            prompts: Any texts; the empty one, which is what guidance departs from, has the two ends.

        Returns:
            Per prompt its tokens, both ends included, with the channels of `first` before those of `second`, and the
            pooled vector of `second`; float32. A prompt longer than both encoders read (77 tokens for the published
            ones) loses the tokens before the end (`num_cut`).

        Raises:
            FoveateError: The tokenizers cut a prompt into different numbers of tokens, so they do not fit.
        """
        return [self._encode_one(prompt) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Tokens that `encode` leaves out, as the prompt is too long."""
        return max(len(self.second.tokenizer.encode(prompt).ids) - self.second.max_tokens, 0)

    def _encode_one(self, prompt: str) -> PooledText:
        first, second = (encoder.tokenizer.encode(prompt).ids for encoder in (self.first, self.second))
        if len(first) != len(second):
            raise FoveateError(
                f"both CLIP tokenizers must cut a prompt alike, got {len(first)} and {len(second)} tokens for "
                f"{prompt!r}; use the tokenizer.json files that were published with the encoders"
            )
        max_tokens = self.second.max_tokens
        first_TE, _ = self.first.features(cut_ids(first, max_tokens))
        second_TE, pooled_F = self.second.features(cut_ids(second, max_tokens))
        return PooledText(tokens_TE=torch.cat((first_TE, second_TE.to(first_TE.device)), dim=1), pooled_F=pooled_F)
