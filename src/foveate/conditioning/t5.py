"""Turns prompts into token features with a frozen T5 encoder: flan-t5-xl is what Infinity was trained on.

Axes: `B` one row, `T` text tokens, `E` text width.

Source: Raffel et al., T5 (arXiv:1910.10683), and Chung et al., Flan (arXiv:2210.11416); the network is the one of
transformers. Published code pads every prompt to 512 tokens, masks the padding and cuts it off behind the encoder. Here
a prompt runs at its real length: the padding reaches no real token, so the features are the same up to rounding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from foveate.conditioning.pretrained import cut_ids, device_of, freeze, read_pretrained
from foveate.core.errors import FoveateError

FLAN_T5_XL = "google/flan-t5-xl"

# One token of the prompt and the end token.
MIN_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Text:
    """A frozen T5 encoder with its tokenizer.

    Making one changes what it is given: gradients of `model` off, evaluation mode on, truncation and padding of
    `tokenizer` off. Nothing changes afterwards.

    Attributes:
        model: `transformers.T5EncoderModel`; features come out on its device.
        tokenizer: Adds the end token behind.
        max_tokens: Longest prompt in tokens, the end token included; at least 2. The published models read 512.
    """

    model: nn.Module
    tokenizer: Tokenizer
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_tokens < MIN_TOKENS:
            raise FoveateError(f"max_tokens must be at least {MIN_TOKENS}, got {self.max_tokens}")
        freeze(self.model, self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = FLAN_T5_XL,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> "T5Text":
        """Reads an encoder from a folder or from the hub, where the first call fetches it.

        Args:
            name_or_path: A folder with config.json, tokenizer.json and weights, or the name of a hub repository. A
                decoder in it is left out.
            dtype: What the encoder computes in. The published code takes float16, where the second matrices of the
                feed-forwards (`wo`) stay in float32, as their outputs overflow.
            device: Where it computes.
            local_files_only: Whether the hub is not asked.

        Raises:
            FoveateError: transformers is not installed.
            CheckpointError: A file or a weight is missing or damaged, or the hub gave nothing.
        """
        model, tokenizer = read_pretrained(
            "T5EncoderModel", name_or_path, dtype=dtype, device=device, local_files_only=local_files_only
        )
        return cls(model=model, tokenizer=tokenizer)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Computes the token features of each prompt, the last hidden states behind the final norm.

        Every prompt runs by itself, without padding, so its features are the same bit for bit whatever it is batched
        with.

        Args:
            prompts: Any texts; the empty one has one token, the end.

        Returns:
            Per prompt a float32 tensor (tokens, width), the end token included. A prompt longer than `max_tokens` loses
            the tokens before the end (`num_cut`).
        """
        return [self._encode_one(prompt) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Tokens that `encode` leaves out, as the prompt is too long."""
        return max(len(self.tokenizer.encode(prompt).ids) - self.max_tokens, 0)

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Float[Tensor, "T E"]:
        ids: list[int] = self.tokenizer.encode(prompt).ids
        ids_BT = torch.tensor([cut_ids(ids, self.max_tokens)], device=device_of(self.model))
        x_BTE: Tensor = self.model(input_ids=ids_BT).last_hidden_state
        return x_BTE[0].float()
