"""What an image needs in memory, from shapes alone: nothing is loaded or run.

Weights, keys and values are exact. What blocks and the decoder hold for a moment is a model of ours with measured
constants, for the largest scale; a test compares it with what a process really takes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.core.conditions import ClassLabel
from foveate.core.guidance import GuidanceSchedule
from foveate.core.policy import Bound, Policy
from foveate.core.schedule import ScaleSchedule
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request, bounds_of
from foveate.families.residency import Residency
from foveate.families.spec import ModelSpec
from foveate.tokenizers.strips import CPU_VALUES
from foveate.weights.quantization import quantized_bytes

_RESIDENT = Residency()

_MODULATION_VALUES = 6
"""Float32 values per row, block and channel: gates, scales and shifts."""
_STREAM_BYTES, _COMPUTE_VALUES = 5, 7
"""Per token and channel a block holds 5 bytes in float32 and 7 values in the compute dtype at its peak; in plain torch,
without our kernels, it is 13 bytes."""
_DECODER_STRIPS = 6
"""Beside its maps the decoder holds so many strips of them (`tokenizers.strips`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes of one request on the compute device.

    Attributes:
        transformer: Its weights, copies of blocks that the policy runs in a narrower dtype included.
        autoencoder: Its weights, those of the encoder too.
        text_encoder: Its weights. What it works with is not counted: tens of megabytes for the longest prompt.
        text: What the transformer holds of the longest prompts it reads: keys, values and modulation of every block.
        kv: Keys and values of the scales, at their bound.
        fills: What the policy keeps to fill skipped blocks, sublayers or guidance.
        blocks: What a block holds for a moment at the largest scale.
        logits: What a scale's outputs take while they are sampled.
        decoder: What the decoder holds for a moment, one image at a time.
        residency: Which weights are there while others work.
    """

    transformer: int
    autoencoder: int
    text_encoder: int
    text: int
    kv: int
    fills: int
    blocks: int
    logits: int
    decoder: int
    residency: Residency = _RESIDENT

    @property
    def drawing(self) -> int:
        """Bytes beside the weights while the transformer runs; they grow in proportion to the number of images."""
        return self.text + self.kv + self.fills + max(self.blocks, self.logits)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes at the most while prompts are encoded, while the transformer runs and while images are decoded."""
        return {
            "encoding": self._weights("text_encoder"),
            "transformer": self._weights("transformer") + self.drawing,
            "decoding": self._weights("autoencoder") + self.decoder,
        }

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.phases.values())

    def _weights(self, working: str) -> int:
        """Bytes of all weights that are there while one part works."""
        parts = {name: getattr(self, name) for name in ("transformer", "autoencoder", "text_encoder")}
        if self.residency.offload:
            return int(parts[working])
        if self.residency.release_text_encoder and working != "text_encoder":
            del parts["text_encoder"]
        return sum(parts.values())

    def to_json(self) -> dict[str, Any]:
        """All parts and phases in bytes, the peak too."""
        parts = {name: getattr(self, name) for name in self.__slots__ if name != "residency"}
        return {**parts, "phases": self.phases, "peak": self.peak}


def count_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters of both networks and of the text encoder, counted without memory for them."""
    counts = {name: count(network) for name, network in _networks(spec).items()}
    return counts | {"text_encoder": spec.conditioning.parameters}


def memory_need(  # noqa: PLR0913 - everything that the size of a request follows from
    spec: ModelSpec,
    dtype: torch.dtype,
    policy: Policy,
    num_images: int = 1,
    *,
    schedule: ScaleSchedule | None = None,
    residency: Residency = _RESIDENT,
    quantization: str | None = None,
    text_tokens: int | None = None,
    is_guided: bool = True,
) -> MemoryNeed:
    """Memory that images take.

    Args:
        spec: The model.
        dtype: What it computes in; MiniLM stays in float32.
        policy: Its bound sets the size of the cache; the working sets are those of a full last scale.
        num_images: Images at once.
        schedule: Their size; None takes the default one.
        residency: Which parts are in memory while others work.
        quantization: How the blocks hold their weights; None stands for `dtype`.
        text_tokens: Tokens of every prompt; None for the longest that the transformer reads.
        is_guided: Whether the unconditional branch runs.
    """
    networks = _networks(spec)
    shape = networks["transformer"].shape
    schedule, size = schedule or spec.default_schedule, dtype.itemsize
    rows = (2 if is_guided else 1) * num_images
    tokens = rows * schedule.scales[-1].num_tokens
    bound = policy.bind(schedule, shape)
    longest = spec.kind.text(spec.transformer).tokens
    read = longest if text_tokens is None else min(text_tokens, longest)
    bounds = bounds_of(bound, _request(schedule, num_images, is_guided), shape, shape.prefix_tokens(longest))
    remembered = 0 if shape.has_text_prefix else read
    return MemoryNeed(
        transformer=transformer_bytes(spec, dtype, quantization) + _narrowed_bytes(bound, schedule, networks, dtype),
        autoencoder=count(networks["autoencoder"]) * size,
        text_encoder=spec.conditioning.num_bytes(dtype),
        text=rows * shape.num_blocks * shape.width * (2 * remembered * size + _MODULATION_VALUES * 4),
        kv=bounds.kv_bytes(shape.num_heads * shape.head_width, size),
        fills=bounds.fill_bytes(size),
        blocks=tokens * shape.width * (_STREAM_BYTES + _COMPUTE_VALUES * size),
        logits=tokens * shape.head_outputs * 3 * 4,
        decoder=decoder_bytes(spec, dtype, schedule),
        residency=residency,
    )


def largest_batch(need: MemoryNeed, resident: int, available: int) -> int:
    """How many images fit at once; 0 if not even one does.

    Args:
        need: What one image takes.
        resident: Bytes of weights that are in memory already, which `available` is without (`resident_bytes`).
        available: Bytes that are left.
    """
    room, phases = available + resident, need.phases
    if max(phases["encoding"], phases["decoding"]) > room:
        return 0
    weights = phases["transformer"] - need.drawing
    return max(0, (room - weights) // need.drawing)


def resident_bytes(spec: ModelSpec, dtype: torch.dtype, quantization: str | None, residency: Residency) -> int:
    """Weights that stay on the compute device between calls."""
    if residency.offload:
        return 0
    text = 0 if residency.release_text_encoder else spec.conditioning.num_bytes(dtype)
    return transformer_bytes(spec, dtype, quantization) + count(_networks(spec)["autoencoder"]) * dtype.itemsize + text


def _narrowed_bytes(bound: Bound, schedule: ScaleSchedule, networks: dict[str, Any], dtype: torch.dtype) -> int:
    """Second weights of the blocks that run in a narrower dtype at some scale."""
    block = networks["transformer"].block
    pairs = {
        (index, plan_dtype)
        for plan in (plan for scale in schedule.scales for plan in bound.ceilings(scale.index))
        for index in range(networks["transformer"].shape.num_blocks)
        if (plan_dtype := plan.dtype_of(index)) is not None and plan_dtype != dtype
    }
    return sum(count(block(index)) * narrow.itemsize for index, narrow in pairs)


def _networks(spec: ModelSpec) -> dict[str, Any]:
    """Both networks without memory for their weights."""
    with torch.device("meta"):
        return {
            "transformer": spec.kind.transformer.build(spec.transformer),
            "autoencoder": spec.kind.autoencoder.build(spec.autoencoder),
        }


def count(network: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in network.parameters())


def _request(schedule: ScaleSchedule, num_images: int, is_guided: bool) -> Request:
    """Images, of which only the number of rows counts here."""
    count = len(schedule)
    return Request(
        schedule=schedule,
        guidance=GuidanceSchedule(weights=(2.0 if is_guided else 1.0,) * count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=0, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=(0,) * num_images),
        conditions=(ClassLabel(index=0),) * num_images,
        num_images=num_images,
    )


def transformer_bytes(spec: ModelSpec, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Weights of the transformer; those of its blocks in the quantisation, the rest in a dtype."""
    transformer = _networks(spec)["transformer"]
    total = count(transformer) * dtype.itemsize
    if quantization is None:
        return total
    linears = quantized_bytes([transformer.block(i) for i in range(transformer.shape.num_blocks)], quantization)
    return total - linears["parameters"] * dtype.itemsize + linears["bytes"]


def decoder_bytes(spec: ModelSpec, dtype: torch.dtype, schedule: ScaleSchedule) -> int:
    """What decoding an image of some pixels takes on a CPU: the map that enters the last resolution, and the next."""
    config = spec.autoencoder
    height, width = (side * spec.stride for side in schedule.grids[-1])
    levels = len(config.channel_multipliers)
    channels = config.base_channels * (config.channel_multipliers[min(1, levels - 1)] + config.channel_multipliers[0])
    # Convolutions run at 1/patch of the pixels; the rest of the stride is what the levels double.
    places = height * width * 4 ** (levels - 1) // config.stride**2
    return (channels * places + _DECODER_STRIPS * CPU_VALUES) * dtype.itemsize
