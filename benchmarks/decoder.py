"""Time, peak memory and error of the decoder: the plain one, channels last, and in strips as images are decoded.

    python benchmarks/decoder.py --model infinity-125m --size 512x512 --dtype float32

Random weights and latents. The sides take turns; times are medians with p10-p90, ratios are formed within a round.
Errors are against the first side, over the standard deviation of its pixels: the largest one and the root mean square.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.bench.memory import meter_for
from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.core.layers import empty_module
from foveate.families.loading import Origin, find_spec
from foveate.pipeline.placement import DTYPES
from foveate.weights.random_weights import fill_randomly

Decode = Callable[[Tensor], Tensor]


def sides_of(build: Callable[[], Any], dtypes: list[str]) -> dict[str, Decode]:
    """What is compared, by name."""
    sides: dict[str, Decode] = {}
    for name in dtypes:
        plain = empty_module(build, torch.float32, torch.device("cpu"))
        fill_randomly(plain)
        plain, last = plain.to(DTYPES[name]), copy.deepcopy(plain)
        last.settle(DTYPES[name], DTYPES[name])
        sides |= {
            f"{name} plain": plain.decode,
            f"{name} channels last": last.decode,
            f"{name} strips": last.decode_in_strips,
        }
    return sides


def main() -> None:
    """Prints one line per side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="infinity-125m")
    parser.add_argument("--size", default="512x512", help="width x height in pixels")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="sides whose name holds this")
    given = parser.parse_args()
    spec = find_spec(Origin(name_or_path=given.model))
    width, height = (int(side) // spec.autoencoder.stride for side in given.size.split("x"))
    latent = torch.randn(1, spec.autoencoder.latent_channels, height, width, generator=torch.Generator().manual_seed(0))
    sides = sides_of(partial(spec.kind.autoencoder.build, spec.autoencoder), given.dtype)
    names = [name for name in sides if given.only in name]
    meter = meter_for(torch.device("cpu"))
    peaks: dict[str, int] = {}
    pixels: dict[str, Tensor] = {}

    @torch.inference_mode()
    def once(side: int, _index: int) -> float:
        name = names[side]
        x = latent.to(DTYPES[name.split()[0]])
        if meter is not None:
            meter.start()
        began = time.perf_counter()
        pixels[name] = sides[name](x).float()
        took = time.perf_counter() - began
        peaks[name] = 0 if meter is None else meter.added_bytes()
        return took

    rounds = alternate(once, len(names), runs=given.runs, warmup=1, after_round=lambda: None)
    exact = pixels[names[0]]
    for side, name in enumerate(names):
        ms = Spread.of([1e3 * seconds for seconds in rounds.of(side)])
        faster = Spread.of([b / own for b, own in zip(rounds.of(0), rounds.of(side), strict=True)])
        error = (pixels[name] - exact) / exact.std()
        print(
            f"{name:24} {ms.median:7.0f} ms ({ms.p10:.0f}-{ms.p90:.0f})  {faster.median:.2f}x "
            f"({faster.p10:.2f}-{faster.p90:.2f})  peak {peaks[name] / 2**20:6.0f} MiB  "
            f"error {error.abs().max():.1e}, {error.square().mean().sqrt():.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
