"""Turns prompts into token features with the Qwen2 language model that HART reads, padding included.

Axes: `B` one row, `T` text tokens of a prompt, `S` tokens of the system prompt, `E` text width.

Source: Yang et al., Qwen2 (arXiv:2407.10671), used as in Tang et al., HART (arXiv:2410.10812); the network is the one
of transformers. A system prompt runs in front of the prompt, and its states are cut off again. HART masks no padding,
so what the model makes of it belongs to the features, and a prompt always runs at the full length.
"""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from foveate.conditioning.pretrained import device_of, fetch_beside, freeze, read_pretrained
from foveate.conditioning.text import RandomText
from foveate.core.conditions import PlacedText
from foveate.core.errors import CheckpointError

QWEN2_HART = "mit-han-lab/Qwen2-VL-1.5B-Instruct"

_SYSTEM_PROMPT = "hart_system_prompt.txt"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_DEFAULT_PAD = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """What stands in front of or behind a prompt that is too short."""

    token: int
    is_left: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenText:
    """A frozen Qwen2 language model with its tokenizer.

    Making one changes what it is given: gradients of `model` off, evaluation mode on, truncation and padding of
    `tokenizer` off. Nothing changes afterwards.

    Attributes:
        model: `transformers.Qwen2Model` or the like; features come out on its device.
        tokenizer: Adds nothing.
        padding: Fills prompts up.
        max_tokens: Tokens of every prompt.
        system_prompt: In front of every prompt; None takes the published one.
    """

    model: nn.Module
    tokenizer: Tokenizer
    padding: Padding
    max_tokens: int = 300
    system_prompt: str | None = None
    _system_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        freeze(self.model, self.tokenizer, adds_end=False)
        text = published_system_prompt() if self.system_prompt is None else self.system_prompt
        object.__setattr__(self, "_system_ids", self.tokenizer.encode(text).ids[: self.max_tokens])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = QWEN2_HART,
        *,
        max_tokens: int = 300,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        local_files_only: bool = False,
    ) -> "QwenText":
        """Reads a model from a folder or from the hub, where the first call fetches it.

        Args:
            name_or_path: A folder with config.json, tokenizer.json, tokenizer_config.json and weights, or the name of a
                hub repository.
            max_tokens: Tokens of every prompt.
            dtype: What the model computes in; the published code takes float16.
            device: Where it computes.
            local_files_only: Whether the hub is not asked.

        Raises:
            FoveateError: transformers is not installed.
            CheckpointError: A file or a weight is missing or damaged, or the hub gave nothing.
        """
        model, tokenizer = read_pretrained(
            "AutoModel", name_or_path, dtype=dtype, device=device, local_files_only=local_files_only
        )
        padding = _padding(fetch_beside(name_or_path, _TOKENIZER_CONFIG, local_files_only), tokenizer)
        return cls(model=model, tokenizer=tokenizer, padding=padding, max_tokens=max_tokens)

    def encode(self, prompts: list[str]) -> list[PlacedText]:
        """Computes the features of each prompt, the last hidden states behind the final norm.

        Every prompt runs by itself, so its features are the same bit for bit whatever it is batched with.

        Args:
            prompts: Any texts; the empty one stands for no prompt, which HART reads as zeros.

        Returns:
            Per prompt `max_tokens` features, float32, padding included, and their positions (`positions_of`). A prompt
            that is longer loses its end (`num_cut`).
        """
        return [self._encode_one(prompt) if prompt else self._nothing() for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Tokens that `encode` leaves out, as the prompt is too long."""
        return max(len(self.tokenizer.encode(prompt).ids) - self.max_tokens, 0)

    def _nothing(self) -> PlacedText:
        config: Any = self.model.config
        width = getattr(config, "text_config", config).hidden_size
        return PlacedText.nothing(self.max_tokens, width, device_of(self.model))

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> PlacedText:
        own = self.tokenizer.encode(prompt).ids[: self.max_tokens]
        fill = [self.padding.token] * (self.max_tokens - len(own))
        ids = [*fill, *own] if self.padding.is_left else [*own, *fill]
        # A token of the prompt that is the padding token counts as padding, as published.
        mask = [token != self.padding.token for token in ids]
        device, system = device_of(self.model), self._system_ids
        x_BSE: Tensor = self.model(
            input_ids=torch.tensor([[*system, *ids]], device=device),
            attention_mask=torch.tensor([[True] * len(system) + mask], dtype=torch.long, device=device),
        ).last_hidden_state
        return PlacedText(tokens_TE=x_BSE[0, len(system) :].float(), positions=positions_of(mask))


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPlacedText:
    """Normal features keyed by the prompt, filled up with zeros to the full length, without any weights."""

    width: int
    max_tokens: int
    device: torch.device

    def encode(self, prompts: list[str]) -> list[PlacedText]:
        """The same features for the same prompt, on every machine; the empty prompt stands for none."""
        texts = zip(prompts, self._tokens().encode(prompts), strict=True)
        return [
            self._padded(tokens_TE) if prompt else PlacedText.nothing(self.max_tokens, self.width, self.device)
            for prompt, tokens_TE in texts
        ]

    def num_cut(self, prompt: str) -> int:
        """Words behind the longest prompt."""
        return self._tokens().num_cut(prompt)

    def _tokens(self) -> RandomText:
        return RandomText(width=self.width, max_tokens=self.max_tokens, device=self.device)

    def _padded(self, tokens_TE: Float[Tensor, "T E"]) -> PlacedText:
        missing = self.max_tokens - len(tokens_TE)
        return PlacedText(
            tokens_TE=torch.cat((tokens_TE, tokens_TE.new_zeros(missing, self.width))),
            positions=positions_of([True] * len(tokens_TE) + [False] * missing),
        )


def positions_of(mask: list[bool]) -> tuple[int, ...]:
    """The number of the prompt's tokens up to each token, less one; padding repeats, and in front it is -1."""
    positions, count = [], 0
    for is_token in mask:
        count += is_token
        positions.append(count - 1)
    return tuple(positions)


def published_system_prompt() -> str:
    """What the published code puts in front of every prompt."""
    return (resources.files("foveate") / "data" / _SYSTEM_PROMPT).read_text(encoding="utf-8")


def _padding(path: Path, tokenizer: Tokenizer) -> Padding:
    """What `tokenizer_config.json` says of padding.

    Raises:
        CheckpointError: The file is damaged, or names a token that the tokenizer does not know.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    name = config.get("pad_token") or _DEFAULT_PAD
    text = name["content"] if isinstance(name, dict) else name
    token = tokenizer.token_to_id(text)
    if token is None:
        raise CheckpointError(f"{path}: the padding token {text!r} is not in the tokenizer")
    return Padding(token=token, is_left=config.get("padding_side") == "left")
