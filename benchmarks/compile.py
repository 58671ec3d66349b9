"""`torch.compile` for the layers between the attentions, against our kernels and plain torch, in turns.

One feed-forward sublayer of an Infinity block with its norm, modulation, gate and residual, random weights. Compiled
code is what Inductor makes of the plain torch that the kernels equal; compiling itself is not counted.

    python benchmarks/compile.py --width 768 --dtype bfloat16 --tokens 8 128 1024 8192 --runs 20
"""

import argparse
import time
from collections.abc import Callable

import torch
from savings import in_torch
from torch import Tensor

from foveate.bench.machine import describe_machine
from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.core.layers import init_weights
from foveate.core.rows import Rows
from foveate.kernels import activation, linear, norm, residual
from foveate.kernels.norm import norm_modulate
from foveate.kernels.residual import add_gated_
from foveate.models.layers import FeedForward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sublayer(layer: FeedForward, rows: Rows, x_nC: Tensor, modulation_R3C: Tensor) -> Tensor:
    """Adds what the feed-forward net makes of the hidden states, in place."""
    factor_RC, shift_RC, gate_RC = modulation_R3C.unbind(1)
    change_nC = layer(norm_modulate(x_nC, factor_RC, shift_RC, rows, layer.fc1.weight.dtype))
    add_gated_(x_nC, change_nC, gate_RC, rows)
    return x_nC


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def row_of(tokens: int, width: int, dtype: torch.dtype, runs: int) -> str:
    """One line of the table: both rows of one image, `tokens` in all."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    rows = Rows((tokens // 2,) * 2)
    # Dynamo cannot compute a cached property, and finds these in place.
    assert (rows.total, rows.uniform, rows.starts[-1]) == (tokens // 2 * 2, tokens // 2, tokens // 2 * 2)
    layer = FeedForward(width, 4 * width).to(dtype).requires_grad_(requires_grad=False)
    init_weights(layer)
    x_nC, modulation_R3C = torch.randn(rows.total, width), torch.randn(2, 3, width)
    compiled = torch.compile(
        lambda x_nC, modulation_R3C: sublayer(layer, rows, x_nC, modulation_R3C), fullgraph=True, dynamic=False
    )

    def plain() -> None:
        with in_torch(activation, linear, norm, residual):
            sublayer(layer, rows, x_nC, modulation_R3C)

    sides = (lambda: sublayer(layer, rows, x_nC, modulation_R3C), plain, lambda: compiled(x_nC, modulation_R3C))
    with torch.inference_mode():
        apart = (compiled(x_nC.clone(), modulation_R3C) - sublayer(layer, rows, x_nC.clone(), modulation_R3C)).abs()
        measured = alternate(
            lambda side, _: milliseconds(sides[side]),
            3,
            runs=runs,
            warmup=3,
            after_round=x_nC.normal_,
        )
    ours, torch_ms, compiled_ms = (measured.of(side) for side in range(3))
    ratios = [Spread.of([a / b for a, b in zip(other, ours, strict=True)]) for other in (torch_ms, compiled_ms)]
    cells = [f"{ratio.median:.2f}x ({ratio.p10:.2f}-{ratio.p90:.2f})" for ratio in ratios]
    return f"| {tokens} | {Spread.of(ours).median:.2f} | {' | '.join(cells)} | {float(apart.max()):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 1024, 8192])
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    cpu = describe_machine()["cpu"]
    print(f"{cpu['name']}, {cpu['threads']} threads, width {args.width}, {args.dtype}, {args.runs} runs\n")
    print("| tokens | our kernels ms | plain torch / ours (p10-p90) | compiled / ours (p10-p90) | largest difference |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        print(row_of(tokens, args.width, DTYPES[args.dtype], args.runs), flush=True)


if __name__ == "__main__":
    main()
