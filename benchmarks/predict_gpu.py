"""Predicts, from counts alone, how long every scale of a published Infinity model takes on a GPU. Nothing is measured.

Per scale: the larger of FLOPs over the rate that matrix products reach and of bytes of weights, keys and values over
the memory's bandwidth; plus what norms, residuals, heads, cache and GELU move, which run between the products; never
less than the host needs to launch it all, or, where a scale is replayed as a graph, than the device needs to go from
kernel to kernel. Everything runs, both branches.

    python benchmarks/predict_gpu.py --model infinity-2b --size 1M --peak-tflops 989 --bandwidth-tb 3.35
"""

import argparse
from dataclasses import dataclass

import torch

from foveate.core.cost import ModelShape, RowWork, ScaleWork, request_cost
from foveate.core.schedule import ScaleSchedule
from foveate.engine.graphs import MOST_TOKENS
from foveate.families.published import PUBLISHED
from foveate.models.infinity import Infinity, InfinityConfig

BYTES = 2
"""Of a weight, key or value in bfloat16."""

MOVED = {
    # Read and written per channel, token and block. Three norms (4 + 2), three residuals (4 + 2 + 4), queries and keys
    # in place (2 x 4), keys and values into the cache (2 x 4), GELU on four widths (4 x 4).
    "kernels": 3 * 6 + 3 * 10 + 8 + 8 + 16,
    # Norm 8, two spread modulations 8, product and sum 16, cast 6; residual: cast 6, spread 4, product 12, sum 12
    # (without a gate 18 in all); queries and keys: cast, length, quotient, rotation, cast 56 each, gain 8; the rest as
    # above.
    "torch": 3 * 38 + 2 * 34 + 18 + 2 * 56 + 8 + 8 + 16,
}
"""Bytes between the matrix products, with Triton kernels and in plain torch."""

LAUNCHES = {"kernels": 22, "torch": 60}
"""Kernels that one block launches for one group of rows, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What the device reaches: dense bfloat16 FLOP/s, bytes/s, seconds per kernel launch, and per kernel of a graph."""

    flops_per_s: float
    bytes_per_s: float
    launch_s: float
    node_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One scale; seconds of its parts."""

    scale: int
    side: str
    products_s: float
    memory_s: float
    between_s: float
    launches_s: float
    nodes_s: float | None
    """Of the graph; None where the scale holds too many tokens to be captured."""

    @property
    def seconds(self) -> float:
        return max(max(self.products_s, self.memory_s) + self.between_s, self.launches_s)

    @property
    def replayed_s(self) -> float:
        if self.nodes_s is None:
            return self.seconds
        return max(max(self.products_s, self.memory_s) + self.between_s, self.nodes_s)

    @property
    def bound(self) -> str:
        if self.launches_s >= self.seconds:
            return "launches"
        return "products" if self.products_s >= self.memory_s else "weights, K/V"


def shape_of(config: InfinityConfig) -> tuple[ModelShape, int]:
    """The sizes of a model, and how many weights a scale reads: those of blocks and head but for text keys and values.

    The model is made without memory for them.
    """
    with torch.device("meta"):
        model = Infinity(config)
    read = [model.head, *(model.block(i) for i in range(config.depth))]
    sizes = [p.numel() for part in read for name, p in part.named_parameters() if name != "ca.mat_kv.weight"]
    return model.shape, sum(sizes)


def predict(model: str, size: str, batch: int, text_tokens: int, path: str, gpu: Gpu) -> list[Prediction]:
    """Every scale of one batch with guidance."""
    config = PUBLISHED[model].spec.transformer
    assert isinstance(config, InfinityConfig), f"{model} is no Infinity model"
    shape, num_weights = shape_of(config)
    schedule = ScaleSchedule.from_template(1.0, size, patch=PUBLISHED[model].spec.patch)
    rows = {(image, is_cond): text_tokens for image in range(batch) for is_cond in (True, False)}
    works, found, flops_before, keys = [], [], 0, 0
    for scale in schedule.scales:
        tokens = scale.num_tokens
        row = RowWork(block_tokens=(tokens,) * shape.num_blocks, head_tokens=tokens)
        works.append(ScaleWork(scale=scale.index, grid_tokens=tokens, rows=dict.fromkeys(rows, row)))
        flops = request_cost(works, shape, rows, BYTES).flops
        keys += tokens
        read = num_weights + 2 * len(rows) * (keys + text_tokens) * shape.width * shape.num_blocks
        moved = MOVED[path] * len(rows) * tokens * shape.width * shape.num_blocks
        found.append(
            Prediction(
                scale=scale.index,
                side=f"{scale.grid[1]}x{scale.grid[0]}",
                products_s=(flops - flops_before) / gpu.flops_per_s,
                memory_s=BYTES * read / gpu.bytes_per_s,
                between_s=moved / gpu.bytes_per_s,
                launches_s=LAUNCHES[path] * shape.num_blocks * gpu.launch_s,
                nodes_s=LAUNCHES[path] * shape.num_blocks * gpu.node_s if len(rows) * tokens <= MOST_TOKENS else None,
            )
        )
        flops_before = flops
    return found


def handed_over_s(model: str, size: str, batch: int, found: list[Prediction], gpu: Gpu) -> float:
    """Seconds for moving keys and values of the captured scales: read and written, two kernel launches per block."""
    spec = PUBLISHED[model].spec
    assert isinstance(spec.transformer, InfinityConfig), f"{model} is no Infinity model"
    shape, _ = shape_of(spec.transformer)
    scales = ScaleSchedule.from_template(1.0, size, patch=spec.patch).scales
    tokens = sum(scale.num_tokens for scale, part in zip(scales, found, strict=True) if part.nodes_s is not None)
    if all(part.nodes_s is not None for part in found):
        return 0.0
    moved = 2 * 2 * 2 * batch * tokens * shape.width * shape.num_blocks * BYTES
    return max(moved / gpu.bytes_per_s, 2 * shape.num_blocks * gpu.launch_s)


def table(model: str, found: list[Prediction], other: list[Prediction], handed_over: float) -> str:
    """A markdown table; the last column is plain torch, without the kernels and without graphs."""
    lines = [
        f"| {model}, *predicted* | matmul ms | weights, K/V ms | between ms | launches ms | scale ms | bound by | "
        "with graphs ms | plain torch ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p, q in zip(found, other, strict=True):
        parts = (p.products_s, p.memory_s, p.between_s, p.launches_s, p.seconds)
        numbers = " | ".join(f"{1e3 * part:.2f}" for part in parts)
        lines.append(
            f"| {p.scale}: {p.side} | {numbers} | {p.bound} | {1e3 * p.replayed_s:.2f} | {1e3 * q.seconds:.2f} |"
        )
    plain, graphs = (1e3 * sum(part) for part in zip(*((p.seconds, p.replayed_s) for p in found), strict=True))
    lines.append(f"| keys and values move | | | | | | | {1e3 * handed_over:.2f} | |")
    graphs += 1e3 * handed_over
    lines.append(f"| all | | | | | {plain:.1f} | | {graphs:.1f} | {1e3 * sum(q.seconds for q in other):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="infinity-2b")
    parser.add_argument("--size", default="1M")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the datasheet, dense bfloat16")
    parser.add_argument("--reached", type=float, default=0.6, help="share of the peak that matmuls reach")
    parser.add_argument("--bandwidth-tb", type=float, default=3.35, help="terabytes per second of the datasheet")
    parser.add_argument("--read-share", type=float, default=0.85, help="share of the bandwidth that is reached")
    parser.add_argument("--launch-us", type=float, default=5.0, help="host microseconds per kernel launch")
    parser.add_argument("--node-us", type=float, default=1.0, help="microseconds of a graph per kernel")
    args = parser.parse_args()
    gpu = Gpu(
        flops_per_s=1e12 * args.peak_tflops * args.reached,
        bytes_per_s=1e12 * args.bandwidth_tb * args.read_share,
        launch_s=1e-6 * args.launch_us,
        node_s=1e-6 * args.node_us,
    )
    found, other = (
        predict(args.model, args.size, args.batch, args.text_tokens, path, gpu) for path in ("kernels", "torch")
    )
    print(table(args.model, found, other, handed_over_s(args.model, args.size, args.batch, found, gpu)))


if __name__ == "__main__":
    main()
