"""Published weights of the Infinity family to ours: maps their keys, refuses what it does not know.

Constant buffers (masks, the zero bias of the keys, the quantiser's) may be there or not; everything else has to fit.
Other families are refused by name.
Source: the published checkpoints of Infinity (arXiv 2412.04431) and their key names.
"""

import math
import re

import torch

from foveate.models.infinity import Infinity, InfinityConfig
from foveate.tokenizers.autoencoder import Autoencoder, AutoencoderConfig
from foveate.weights.key_map import (
    WeightKind,
    autoencoder_shape,
    axes_of,
    copy_weights,
    declare,
)
from foveate.weights.names import plain_state, put_once
from foveate.weights.stored import State, Stored, Weight, on_meta, renamed

declare(WeightKind(name="Infinity", role="an Infinity transformer", marks=("cfg_uncond",)))
declare(
    WeightKind(
        name="autoencoder",
        role="an Infinity autoencoder",
        marks=("encoder.conv_in.weight", "encoder.conv_in.conv.weight"),
        unless=("quantize.embedding.weight",),
        is_autoencoder=True,
    )
)

_CONSTANTS = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_QUANTISERS = ("quantizer.", "quantize.")
_BLOCK = re.compile(r"(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.(.+)")
_WRAPPED_CONV = re.compile(r"^(.*(?:conv\w*|nin_shortcut))\.conv\.(weight|bias)$")
_WRAPPED_NORM = re.compile(r"^(.*norm\w*)\.norm\.(weight|bias)$")


def infer_infinity_config(state: State) -> InfinityConfig:
    """Reads the shape of an Infinity transformer off its weights (what leaves no trace in them keeps its default).

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = transformer_state(state)
    chunks, per_chunk = _chunking(state)
    block = "block_chunks.0.module.0" if any(key.startswith("block_chunks.") for key in state) else "blocks.0"
    text_tokens, text_width = axes_of(state, "cfg_uncond", 2)
    width, bits = axes_of(state, "word_embed.weight", 2)
    return InfinityConfig(
        depth=chunks * per_chunk,
        width=width,
        heads=math.prod(axes_of(state, f"{block}.sa.scale_mul_1H11", 4)),
        bits=bits,
        text_width=text_width,
        pool_heads=axes_of(state, "text_proj_for_sos.ca.mat_q", 3)[1],
        chunks=chunks,
        text_tokens=text_tokens,
        ff_width=axes_of(state, f"{block}.ffn.fc1.weight", 2)[0],
    )


def infer_autoencoder_config(state: State) -> AutoencoderConfig:
    """Reads the shape of an autoencoder off its weights.

    Raises:
        CheckpointError: A weight that the shape follows from is missing, or the weights are of another family.
    """
    state = autoencoder_state(state)
    return AutoencoderConfig(
        **autoencoder_shape(state),
        latent_channels=axes_of(state, "decoder.conv_in.weight", 4)[1],
        patch=round((axes_of(state, "encoder.conv_in.weight", 4)[1] / 3) ** 0.5),
    )


def load_transformer(model: Infinity, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into a transformer; `copy_weights` says what is refused."""
    copy_weights(model, transformer_tensors(state, model.config), "transformer", dtype)


def transformer_tensors(state: State, config: InfinityConfig) -> Stored:
    """Published weights under the names and in the layout that a transformer of this shape has; nothing is read.

    Raises:
        CheckpointError: A weight is there twice, or the weights are of another family.
    """
    size = config.depth // config.chunks
    names: dict[str, str] = {}
    found = transformer_state(state)
    _, per_chunk = _chunking(found)
    for key in found:
        match = _BLOCK.fullmatch(key)
        name = key
        if match is not None:
            index = int(match[1] or 0) * per_chunk + int(match[2])
            name = f"block_chunks.{index // size}.module.{index % size}.{match[3]}"
        put_once(names, name, key)
    weights = dict(renamed(found, names).weights)
    for name, weight in weights.items():
        if name.endswith("scale_mul_1H11"):
            weights[name] = _gain(weight)
    return Stored(weights)


def load_autoencoder(model: Autoencoder, state: State, *, dtype: torch.dtype | None = None) -> None:
    """Copies published weights into an autoencoder; `copy_weights` says what is refused."""
    copy_weights(model, autoencoder_state(state), "autoencoder", dtype)


def transformer_state(state: State) -> Stored:
    """A transformer's weights without nesting and constant buffers."""
    return plain_state(state, "Infinity", _CONSTANTS)


def autoencoder_state(state: State) -> Stored:
    """An autoencoder's weights without nesting, wrapper names and the quantiser's buffers."""
    state = plain_state(state, "autoencoder")
    names: dict[str, str] = {}
    for key in state:
        if not key.startswith(_QUANTISERS):
            put_once(names, _unwrap(key), key)
    return renamed(state, names)


def _gain(weight: Weight) -> Weight:
    """Head temperatures along the second axis; some checkpoints have them along the third."""
    shape = (1, weight.described.numel(), 1, 1)
    return Weight(described=on_meta(shape, weight.described.dtype), read=lambda: weight.read().reshape(shape))


def _unwrap(key: str) -> str:
    """A key without the name of the wrapper around a convolution or a norm."""
    for pattern in (_WRAPPED_CONV, _WRAPPED_NORM):
        match = pattern.match(key)
        if match is not None:
            return f"{match[1]}.{match[2]}"
    return key


def _chunking(state: State) -> tuple[int, int]:
    """Chunks and blocks per chunk; blocks without chunks count as one chunk."""
    blocks = [match for match in map(_BLOCK.fullmatch, state) if match is not None]
    chunks = 1 + max((int(match[1] or 0) for match in blocks), default=-1)
    per_chunk = 1 + max((int(match[2]) for match in blocks), default=-1)
    return chunks, per_chunk
