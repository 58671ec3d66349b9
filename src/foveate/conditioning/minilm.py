"""Turns prompts into token features with a frozen all-MiniLM-L6-v2 encoder.

Axes: `B` rows, `T` text tokens, `E` text width, `N` heads, `D` width of a head.

Source: Reimers and Gurevych, Sentence-BERT (arXiv:1908.10084) on Wang et al., MiniLM (arXiv:2002.10957); the weights
are sentence-transformers/all-MiniLM-L6-v2 and the parameter names here are the published ones. Two differences: the
pooler, which sentence embeddings never use, is left out, and every token has type 0, as prompts are never pairs.
"""

import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float16, Int, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.conditioning.bert import BertBlock, require_sizes
from foveate.conditioning.places import PLACES_NAME, Places
from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.layers import Embedding, empty_module

WEIGHTS_NAME = "text_encoder.safetensors"
TOKENIZER_NAME = "tokenizer.json"

# Below this many elements int8 saves nothing worth its error: only the token types (2 x 384) of the published model.
QUANTISE_MIN_NUMEL = 1024
INT8_MAX = 127

# [CLS], one token of the prompt, [SEP].
MIN_TOKENS = 3

logger = logging.getLogger("foveate")


@dataclass(frozen=True, kw_only=True, slots=True)
class MiniLMConfig:
    """The sizes of the encoder; the defaults are those of all-MiniLM-L6-v2.

    Attributes:
        vocab_size: Rows of the word embedding.
        max_positions: Longest sequence in tokens, ends included.
        width: Text width E, a multiple of `num_heads`.
        num_heads: Attention heads N.
        num_blocks: Transformer blocks.
        hidden_width: Inner width of the feed-forward.
    """

    vocab_size: int = 30522
    max_positions: int = 512
    width: int = 384
    num_heads: int = 12
    num_blocks: int = 6
    hidden_width: int = 1536

    def __post_init__(self) -> None:
        require_sizes(asdict(self))


def mean_pool(x_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B E"]:
    """Averages token features into sentence embeddings, in float32.

    Args:
        x_BTE: Token features.
        mask_BT: True at real tokens; at least one in each row.

    Returns:
        Float32 embeddings of length 1.
    """
    weight_BT1 = mask_BT.unsqueeze(-1).float()
    mean_BE = (x_BTE.float() * weight_BT1).sum(1) / weight_BT1.sum(1)
    return F.normalize(mean_BE, dim=-1)


def quantise_rows(w_ij: Float[Tensor, "i j"]) -> tuple[Int8[Tensor, "i j"], Float16[Tensor, " i"]]:
    """Rounds a matrix to int8 with one scale per row.

    Args:
        w_ij: The matrix; it is left as it was.

    Returns:
        Integers from -127 to 127 and the float16 scales that `dequantise_rows` multiplies them with.
    """
    # The floor keeps a row of zeros finite. Rounding is against the scale as float16 stores it, not the exact one.
    scale_i = (w_ij.float().abs().amax(1) / INT8_MAX).clamp_min(torch.finfo(torch.float16).tiny).half()
    steps_ij = (w_ij.float() / scale_i.float().unsqueeze(1)).round().clamp(-INT8_MAX, INT8_MAX)
    return steps_ij.to(torch.int8), scale_i


def dequantise_rows(
    steps_ij: Int8[Tensor, "i j"], scale_i: Float16[Tensor, " i"], w_ij: Float[Tensor, "i j"]
) -> Float[Tensor, "i j"]:
    """Undoes `quantise_rows` up to rounding.

    Args:
        steps_ij: The integers.
        scale_i: The scales.
        w_ij: Is filled, so that nothing of the same size exists beside it.

    Returns:
        `w_ij`.
    """
    return w_ij.copy_(steps_ij).mul_(scale_i.float().unsqueeze(1))


class _Embeddings(nn.Module):
    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.width)
        self.position_embeddings = Embedding(config.max_positions, config.width)
        self.token_type_embeddings = Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        position_TE = self.position_embeddings.weight[: ids_BT.shape[1]]
        x_BTE: Tensor = self.LayerNorm(
            self.word_embeddings(ids_BT) + position_TE + self.token_type_embeddings.weight[0]
        )
        return x_BTE


class _Encoder(nn.Module):
    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertBlock(config.width, config.num_heads, config.hidden_width) for _ in range(config.num_blocks)
        )

    def forward(
        self, x_BTE: Float[Tensor, "B T E"], mask_BT: Bool[Tensor, "B T"], num_blocks: int | None
    ) -> list[Tensor]:
        states = [x_BTE]
        for block in self.layer[:num_blocks]:
            states.append(block(states[-1], mask_BT))
        return states


class MiniLM(nn.Module):
    """The BERT encoder: post-norm blocks with exact GELU, no dropout.

    Attributes:
        config: The sizes it was built with.
    """

    def __init__(self, config: MiniLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        """Computes token features, the hidden states behind the last block.

        Args:
            ids_BT: Token ids, padded on the right; T is at most `config.max_positions`.
            mask_BT: True at real tokens; at least one in each row.

        Returns:
            Features in the dtype of the weights; what stands at padded positions means nothing.
        """
        return self.states(ids_BT, mask_BT)[-1]

    def states(
        self, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], num_blocks: int | None = None
    ) -> list[Tensor]:
        """Computes the features in front of the first block and behind each, shape (B, T, E); the last are `forward`'s.

        Args:
            ids_BT: As `forward` takes them.
            mask_BT: As `forward` takes it.
            num_blocks: How many blocks to run; None runs all.
        """
        states: list[Tensor] = self.encoder(self.embeddings(ids_BT), mask_BT, num_blocks)
        return states

    def pooled(self, ids_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        """Computes sentence embeddings: the mean over real tokens, float32, of length 1."""
        return mean_pool(self(ids_BT, mask_BT), mask_BT)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A frozen text encoder with its tokenizer. Nothing here needs or takes gradients.

    Making one changes what it is given: gradients of `model` off, evaluation mode on, truncation and padding of
    `tokenizer` off. Nothing changes afterwards.

    Attributes:
        model: The encoder; features come out on its device.
        tokenizer: Adds [CLS] in front and [SEP] behind.
        max_tokens: Longest prompt in tokens, both of them included; from 3 to the positions of the model.
        places: Position tagger, on the device of `model`; None leaves the tokens as they are.
    """

    model: MiniLM
    tokenizer: Tokenizer
    max_tokens: int = 64
    places: Places | None = None

    def __post_init__(self) -> None:
        max_positions = self.model.config.max_positions
        if not MIN_TOKENS <= self.max_tokens <= max_positions:
            raise FoveateError(f"max_tokens must be in [{MIN_TOKENS}, {max_positions}], got {self.max_tokens}")
        vocab_size = self.model.config.vocab_size
        if self.tokenizer.get_vocab_size() > vocab_size:
            raise FoveateError(
                f"tokenizer must have at most vocab_size = {vocab_size} tokens, got {self.tokenizer.get_vocab_size()}"
            )
        if self.places is not None and not self.places.fits(self.model.config.width, self.model.config.num_blocks):
            raise FoveateError(
                f"the position tagger must fit the encoder, got {self.places.config} for {self.model.config}"
            )
        self.model.requires_grad_(requires_grad=False).eval()
        # The published file cuts and pads to 128 in silence; here `encode` cuts, and says so.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @classmethod
    def from_folder(cls, path: Path, dtype: torch.dtype = torch.float32) -> "TextEncoder":
        """Reads what `save` wrote; a folder without `text_places.safetensors` has an encoder without places.

        Args:
            path: The folder.
            dtype: What the encoder computes in. The weights pass through float32 either way.

        Returns:
            The encoder, on the CPU.

        Raises:
            CheckpointError: If weights or tokenizer are missing, or a file is damaged, or weights carry no
                configuration or do not fit it.
        """
        for name in (WEIGHTS_NAME, TOKENIZER_NAME):
            if not (path / name).is_file():
                raise CheckpointError(f"a text encoder needs {name}, no such file in {path}")
        model = _read_model(path / WEIGHTS_NAME)
        try:
            tokenizer = Tokenizer.from_file(str(path / TOKENIZER_NAME))
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise CheckpointError(f"{path / TOKENIZER_NAME}: not a readable tokenizer ({_one_line(error)})") from error
        places = Places.from_folder(path)
        return cls(model=model.to(dtype), tokenizer=tokenizer, places=None if places is None else places.to(dtype))

    def to(self, device: torch.device) -> "TextEncoder":
        """Moves the weights to a device; the encoder itself is returned."""
        self.model.to(device)
        if self.places is not None:
            self.places.to(device)
        return self

    def save(self, path: Path, *, quantise: bool = True) -> None:
        """Writes `text_encoder.safetensors`, `tokenizer.json` and, if it has places, `text_places.safetensors`.

        Args:
            path: The folder; it is made if missing, and files of these names are replaced.
            quantise: Whether matrices become int8 with a float16 scale per row (`NAME` and `NAME.scale`) and the rest
                float16. Otherwise the weights are written as they are.
        """
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: w.cpu().contiguous() for name, w in self.model.state_dict().items()}
        metadata = {"config": json.dumps(asdict(self.model.config))}
        with replace_file(path / WEIGHTS_NAME) as partial:
            save_file(_pack(weights) if quantise else weights, partial, metadata=metadata)
        write_text(path / TOKENIZER_NAME, self.tokenizer.to_str())
        if self.places is None:
            (path / PLACES_NAME).unlink(missing_ok=True)
        else:
            self.places.save(path)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Computes the features of each prompt: its sentence embedding, then its tokens.

        Sentence embeddings of like meanings lie near each other, token features need not: the embedding stands where
        [CLS] would, whose feature sentence encoders are not trained to use by itself. Every prompt runs by itself,
        without padding, so its features are the same bit for bit whatever it is batched with.

        Args:
            prompts: Any texts; the empty one has the two tokens [CLS] and [SEP].

        Returns:
            Per prompt a float32 tensor (tokens, width): row 0 is the mean over all tokens, [CLS] included, and the
            others are the tokens behind [CLS], [SEP] included, with their `places`. A prompt longer than `max_tokens`
            loses the tokens before [SEP] (`num_cut`).
        """
        return [self._features([prompt])[0] for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        """Tokens that `encode` leaves out, as the prompt is too long."""
        return max(len(self.tokenizer.encode(prompt).ids) - self.max_tokens, 0)

    def encode_together(self, prompts: list[str]) -> list[Tensor]:
        """`encode` in one padded call, several times as fast: equal up to rounding, which depends on the batch."""
        return self._features(prompts)

    def pooled(self, prompts: list[str]) -> Float[Tensor, "B E"]:
        """Computes sentence embeddings: row 0 of `encode` scaled to length 1, float32."""
        if not prompts:
            raise FoveateError("prompts must hold at least one text, got none")
        return F.normalize(torch.stack([x_TE[0] for x_TE in self.encode(prompts)]), dim=-1)

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(prompt).ids
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]

    @torch.no_grad()
    def _features(self, prompts: list[str]) -> list[Tensor]:
        """The features of prompts that run in one call; one by itself has no padding."""
        ids_BT, mask_BT = self.padded(prompts)
        states = self.model.states(ids_BT, mask_BT)
        x_BTE = states[-1]
        marked_BTE = x_BTE if self.places is None else self.places.marked(x_BTE, states, mask_BT)
        return [
            torch.cat((x_TE[:count].mean(0, keepdim=True), marked_TE[1:count])).float()
            for x_TE, marked_TE, count in zip(x_BTE.float(), marked_BTE, mask_BT.sum(1).tolist(), strict=True)
        ]

    def padded(self, prompts: list[str]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Token ids, padded on the right, on the device of the model, and True at those that are no padding."""
        ids = [torch.tensor(self._ids(prompt), dtype=torch.long, device="cpu") for prompt in prompts]
        counts_B1 = torch.tensor([[len(own)] for own in ids], device="cpu")
        ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask_BT = torch.arange(ids_BT.shape[1], device="cpu") < counts_B1
        device = self.model.embeddings.word_embeddings.weight.device
        return ids_BT.to(device), mask_BT.to(device)


def _read_model(path: Path) -> MiniLM:
    """The model of a weight file that carries its configuration; one tensor at a time lives twice."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable weight file, fetch it again ({_one_line(error)})") from error
    if "config" not in metadata:
        raise CheckpointError(f"{path} must carry `config` in its metadata, got {sorted(metadata)}")
    try:
        config = MiniLMConfig(**json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: `config` in its metadata is damaged ({_one_line(error)})") from error
    model = empty_module(partial(MiniLM, config), torch.float32, torch.device("cpu"))
    own = model.state_dict()
    wrong = sorted(own.keys() ^ {name for name in names if not name.endswith(".scale")})
    if wrong:
        raise CheckpointError(f"{path} must fit its own configuration: {len(wrong)} keys do not, first {wrong[0]}")
    for name, w in own.items():
        try:
            _unpack(path, name, w)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path} must fit its own configuration: {name}: {_one_line(error)}") from error
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pack(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, w in weights.items():
        if w.ndim > 1 and w.numel() >= QUANTISE_MIN_NUMEL:
            packed[name], packed[f"{name}.scale"] = quantise_rows(w)
        else:
            packed[name] = w.half()
    return packed


@torch.no_grad()
def _unpack(path: Path, name: str, w: Tensor) -> None:
    """Fills `w` with a weight as `_pack` left it; the file is opened anew, so that no pages of it pile up."""
    with safe_open(path, "pt") as file:
        stored = file.get_tensor(name)
        if stored.shape != w.shape:
            raise RuntimeError(f"shape {tuple(stored.shape)} instead of {tuple(w.shape)}")
        if stored.dtype == torch.int8:
            dequantise_rows(stored, file.get_tensor(f"{name}.scale"), w)
        else:
            w.copy_(stored)
