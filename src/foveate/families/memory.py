"""What a picture needs in memory, from shapes alone: nothing is loaded or run.

Weights, keys and values are exact. What blocks and the decoder hold for a moment is a model of ours with measured
constants, for the largest scale; a test compares it with what a process really takes.
"""

from dataclasses import dataclass

import torch

from foveate.core.conditions import ClassLabel
from foveate.core.guidance import GuidanceSchedule
from foveate.core.plan import Policy
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request, bounds_of
from foveate.families.spec import ModelSpec
from foveate.models.quantization import quantized_bytes
from foveate.tokenizers.strips import CPU_VALUES

TEXT_ENCODER_PARAMETERS = {
    "minilm": 22_565_376,
    "t5-xl": 1_223_527_424,
    "clip-pair": 123_060_480 + 693_021_440,
    "imagenet": 0,
}
"""Of the text encoders of every kind of conditioner, word embeddings included."""

_STREAM_BYTES, _COMPUTE_VALUES = 13, 7
"""Per token and channel a block holds 13 bytes in float32 and 7 values in the compute dtype at its peak."""
_DECODER_STRIPS = 6
"""Beside its maps the decoder holds so many strips of them (`tokenizers.strips`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes of one request. The three working sets never exist at the same time.

    `logits` holds what a scale's outputs take while they are sampled.
    """

    transformer: int
    autoencoder: int
    text_encoder: int
    kv: int
    blocks: int
    logits: int
    decoder: int

    @property
    def peak(self) -> int:
        """With all weights resident."""
        weights = self.transformer + self.autoencoder + self.text_encoder
        return weights + max(self.kv + max(self.blocks, self.logits), self.decoder)

    def to_json(self) -> dict[str, int]:
        """All parts in bytes, the peak too."""
        return {name: getattr(self, name) for name in (*self.__slots__, "peak")}


def count_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters of both networks and of the text encoder, counted without memory for them."""
    with torch.device("meta"):
        networks = {
            "transformer": spec.kind.transformer.build(spec.transformer),
            "autoencoder": spec.kind.autoencoder.build(spec.autoencoder),
        }
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return counts | {"text_encoder": TEXT_ENCODER_PARAMETERS[spec.conditioner]}


def memory_need(
    spec: ModelSpec, dtype: torch.dtype, policy: Policy, num_images: int = 1, quantization: str | None = None
) -> MemoryNeed:
    """What guided pictures of the default size take.

    Args:
        spec: The model.
        dtype: What it computes in; MiniLM stays in float32.
        policy: Its bound sets the size of the cache; the working sets are those of a full last scale.
        num_images: Pictures at once.
        quantization: How the blocks hold their weights; None stands for `dtype`.
    """
    with torch.device("meta"):
        shape = spec.kind.transformer.build(spec.transformer).shape
    schedule, size = spec.default_schedule, dtype.itemsize
    count = len(schedule)
    request = Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(2.0,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=(0,) * num_images),
        conditions=(ClassLabel(index=0),) * num_images,
        num_images=num_images,
    )
    bounds = bounds_of(policy.bind(schedule, shape), request, shape)
    parameters = count_parameters(spec)
    tokens = 2 * num_images * schedule.scales[-1].num_tokens
    height, width = (side * spec.stride for side in schedule.grids[-1])
    text_size = 4 if spec.conditioner == "minilm" else size
    return MemoryNeed(
        transformer=transformer_bytes(spec, dtype, quantization),
        autoencoder=parameters["autoencoder"] * size,
        text_encoder=parameters["text_encoder"] * text_size,
        kv=bounds.kv_bytes(shape.num_heads * shape.head_width, size),
        blocks=tokens * shape.width * (_STREAM_BYTES + _COMPUTE_VALUES * size),
        logits=tokens * shape.head_outputs * 3 * 4,
        decoder=decoder_bytes(spec, dtype, height, width),
    )


def transformer_bytes(spec: ModelSpec, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Weights of the transformer; those of its blocks in the quantisation, the rest in a dtype."""
    with torch.device("meta"):
        transformer = spec.kind.transformer.build(spec.transformer)
    total = sum(p.numel() for p in transformer.parameters()) * dtype.itemsize
    if quantization is None:
        return total
    blocks = [transformer.block(i) for i in range(transformer.shape.num_blocks)]
    linears = quantized_bytes(blocks, quantization)
    return total - linears["parameters"] * dtype.itemsize + linears["bytes"]


def decoder_bytes(spec: ModelSpec, dtype: torch.dtype, height: int, width: int) -> int:
    """What decoding a picture of some pixels takes on a CPU: the map that enters the last resolution, and the next."""
    config = spec.autoencoder
    levels = len(config.channel_multipliers)
    channels = config.base_channels * (config.channel_multipliers[min(1, levels - 1)] + config.channel_multipliers[0])
    # Convolutions run at 1/patch of the pixels; the rest of the stride is what the levels double.
    places = height * width * 4 ** (levels - 1) // config.stride**2
    return (channels * places + _DECODER_STRIPS * CPU_VALUES) * dtype.itemsize
