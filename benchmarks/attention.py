"""Compares torch's attention kernels on the shapes of a model, scale by scale, on this device.

    python benchmarks/attention.py --model infinity-2b --size 1M --device cuda --dtype bfloat16

One block, batch 1, both branches, every earlier token as a key: what the last blocks of an exact run ask for. The
kernels take turns; times are medians, ratios to torch's own choice are formed within a round, p10-p90. A kernel that
refuses a shape is left out there; asking for one by name costs the host some microseconds a call, which small scales
show. On a CPU the C code stands beside them.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.core.schedule import parse_ratio
from foveate.families.loading import Origin, find_spec
from foveate.kernels import native
from foveate.kernels.attention import attend_group
from foveate.pipeline.placement import DTYPES

BACKENDS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OURS = "ours in C"
_ROWS = 2


def runner(name: str, q_nND: Tensor, k_RNmD: Tensor, v_RNmD: Tensor) -> Callable[[], Tensor]:
    """One call of a kernel, in the layout that the engine hands out."""
    if name == OURS:
        return lambda: attend_group(q_nND, k_RNmD, v_RNmD, 1.0)
    backend = BACKENDS[name]
    q_RNlD = q_nND.unflatten(0, (_ROWS, -1)).transpose(1, 2)

    def run() -> Tensor:
        within: AbstractContextManager[None] = nullcontext() if backend is None else sdpa_kernel(backend)
        with within:
            return F.scaled_dot_product_attention(q_RNlD, k_RNmD, v_RNmD, scale=1.0)

    return run


def runs_here(run: Callable[[], Tensor]) -> bool:
    """Whether a kernel takes the shape; it also warms up."""
    try:
        run()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Prints one line per scale and kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="infinity-2b")
    parser.add_argument("--size", default="1M", help="0.06M, 0.25M, 0.60M or 1M pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    spec = find_spec(Origin(name_or_path=given.model))
    with torch.device("meta"):
        shape = spec.kind.transformer.build(spec.transformer).shape
    heads, width, keys = shape.num_heads, shape.head_width, 0
    print("| scale | queries | keys | kernel | us | against torch's choice (p10-p90) |\n|---|---|---|---|---|---|")
    for scale in spec.schedule(parse_ratio(spec.ratios[0]), given.size).scales:
        keys += scale.num_tokens
        q_nND = torch.randn(_ROWS * scale.num_tokens, heads, width, device=device, dtype=dtype)
        k_RNmD, v_RNmD = torch.randn(2, _ROWS, heads, keys, width, device=device, dtype=dtype).unbind()
        names = [*BACKENDS, *([OURS] if native.serves(q_nND, k_RNmD) else [])]
        runs = {name: runner(name, q_nND, k_RNmD, v_RNmD) for name in names}
        runs = {name: run for name, run in runs.items() if runs_here(run)}
        report(f"{scale.index}: {scale.grid[0]}x{scale.grid[1]}", scale.num_tokens, keys, runs, device, given.runs)


def report(
    scale: str, queries: int, keys: int, runs: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int
) -> None:
    """Measures the kernels of one scale in turns and prints them, the fastest in bold."""
    names = list(runs)

    def once(side: int, _index: int) -> float:
        synchronise(device)
        began = time.perf_counter()
        runs[names[side]]()
        synchronise(device)
        return time.perf_counter() - began

    measured = alternate(once, len(names), runs=rounds, warmup=2, after_round=lambda: None)
    if measured.stopped is not None:
        raise SystemExit(f"stopped at scale {scale}: {measured.stopped}")
    times = {name: Spread.of([1e6 * s for s in measured.of(side)]) for side, name in enumerate(names)}
    best = min(times, key=lambda name: times[name].median)
    for side, name in enumerate(names):
        ratio = Spread.of([a / b for a, b in zip(measured.of(side), measured.of(0), strict=True)])
        shown = f"**{name}**" if name == best else name
        print(
            f"| {scale} | {queries} | {keys} | {shown} | {times[name].median:.0f} "
            f"| {ratio.median:.2f}x ({ratio.p10:.2f}-{ratio.p90:.2f}) |"
        )


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
