"""Cost and savings of dtypes: a decoder in bfloat16, weights of the blocks in int8 and fp8.

    python benchmarks/quantization.py --dtype float32

Every side generates the same prompts with the same keyed draws. Bytes are counted, PSNR is against the plain model of
the same dtype (100 dB: equal images), times are medians of calls that take turns, ratios are formed within a round:
plain over side, so above 1 is faster.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from foveate.bench.memory import weights_bytes
from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.core.prompt_file import read_prompt_file
from foveate.engine.report import Milliseconds
from foveate.eval.fidelity import psnr
from foveate.eval.statistics import summarise
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.pipeline.placement import DTYPES

SIDES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoder bfloat16": {"decoder_dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
}


def pictures(pipe: Pipeline, prompts: list[str], batch: int) -> np.ndarray:
    """One image of every prompt; the seed is the prompt's number."""
    parts = []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        seeds = [first + i for i in range(len(group))]
        parts.append(pipe(group, seed=seeds, output_type="np").images)
    return np.concatenate([stack_uint8(part) for part in parts])


def told(part: str, baseline: list[Milliseconds], own: list[Milliseconds]) -> str:
    """Median time of a part, and how many times faster it is."""
    ms = Spread.of([getattr(run, part) for run in own])
    faster = Spread.of([getattr(b, part) / getattr(o, part) for b, o in zip(baseline, own, strict=True)])
    return f"{part} {ms.median:.0f} ms, {faster.median:.2f}x ({faster.p10:.2f}-{faster.p90:.2f})"


def main() -> None:
    """Prints three lines per side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=9)
    given = parser.parse_args()
    prompts = read_prompt_file(Path(__file__).with_name("prompts.txt"))[: given.prompts]
    pipes = {name: Pipeline.from_pretrained(given.model, dtype=given.dtype, **kind) for name, kind in SIDES.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    names = list(pipes)

    def once(side: int, index: int) -> Milliseconds:
        seeds = [given.batch * index + i for i in range(given.batch)]
        options: dict[str, Any] = {"seed": seeds, "output_type": "np"}
        return pipes[names[side]]([prompts[s % len(prompts)] for s in seeds], **options).report.ms

    rounds = alternate(once, len(names), runs=given.runs, warmup=1, after_round=lambda: None)
    exact = pictures(pipes["plain"], prompts, given.batch)
    for side, name in enumerate(names):
        own = pictures(pipes[name], prompts, given.batch)
        decibel = summarise(psnr(own, exact))
        size = weights_bytes(pipes[name].model)
        print(f"{name}, {given.dtype}: " + ", ".join(f"{part} {count / 1e6:.2f} MB" for part, count in size.items()))
        print(
            f"  PSNR mean {decibel.mean:.1f}, p10 {decibel.p10:.1f}, min {decibel.min:.1f} dB, {len(prompts)} prompts"
        )
        times = [told(part, rounds.of(0), rounds.of(side)) for part in ("transformer", "decoder", "total")]
        print(f"  {'; '.join(times)}", flush=True)


if __name__ == "__main__":
    main()
