"""Throughput of batching: images per second at batch 1 and batched, and whether every image has the same bytes.

Eight prompts, one seed each, in turns: one call per image, and one call for all. On a CPU the images of a call are
requests of their own that share their products, so the bytes must be equal: exit code 1 if not.

    python benchmarks/batching.py --dtype bfloat16 --runs 7
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.bench.machine import describe_machine
from foveate.bench.rounds import alternate
from foveate.bench.spread import Spread
from foveate.core.prompt_file import read_prompt_file
from foveate.kernels import native
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline, stack_uint8

POLICIES = ("full", "ld-pruning", "ld-pruning:sats=false", "depthvar", "drop-branch")
PROMPTS = Path(__file__).parent / "prompts.txt"
PARTS = ("transformer", "total")


def generate(pipe: Pipeline, prompts: list[str], policy: str, together: bool) -> tuple[np.ndarray, dict[str, float]]:
    """All images as bytes (n, height, width, 3), and milliseconds of the transformer and in total."""
    calls = [(prompts, list(range(len(prompts))))] if together else [([p], [i]) for i, p in enumerate(prompts)]
    outputs = [pipe(texts, **Options(policy=policy, output_type="np", seed=seeds)) for texts, seeds in calls]
    images = np.concatenate([stack_uint8(output.images) for output in outputs])
    return images, {part: sum(getattr(output.report.ms, part) for output in outputs) for part in PARTS}


def measure(pipe: Pipeline, prompts: list[str], policy: str, runs: int) -> dict[str, Any]:
    """One policy, both ways in turns."""
    rounds = alternate(
        lambda side, _: generate(pipe, prompts, policy, bool(side)), 2, runs=runs, warmup=1, after_round=lambda: None
    )
    alone, together = rounds.of(0), rounds.of(1)
    speedup = {
        part: Spread.of([a[1][part] / b[1][part] for a, b in zip(alone, together, strict=True)]).to_json()
        for part in PARTS
    }
    return {
        "policy": policy,
        "images_per_s": {
            name: 1e3 * len(prompts) / Spread.of([one[1]["total"] for one in side]).median
            for name, side in (("alone", alone), ("together", together))
        },
        "speedup": speedup,
        "num_changed": int((alone[0][0] != together[0][0]).any(axis=(1, 2, 3)).sum()),
    }


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    rates = " | ".join(f"{rate:.1f}" for rate in found["images_per_s"].values())
    spreads = " | ".join(
        f"{gain['median']:.2f}x ({gain['p10']:.2f}-{gain['p90']:.2f})" for gain in found["speedup"].values()
    )
    return f"| `{found['policy']}` | {rates} | {spreads} | {found['num_changed']} |"


def main() -> int:
    """Prints a table, or JSON; 1 if an image differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = Pipeline.from_pretrained("emoji-tiny", dtype=arguments.dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(read_prompt_file(PROMPTS))[: arguments.batch]
    cpu = describe_machine()["cpu"]
    if not arguments.json:
        print(
            f"emoji-tiny, {len(prompts)} images, {arguments.dtype}, {cpu['name']}, {arguments.threads} threads, "
            f"kernels: {native.describe()}\n"
        )
        print("| policy | alone /s | together /s | transformer | whole call | images that differ |")
        print("|---|---|---|---|---|---|")
    found = []
    for policy in POLICIES:
        found.append(measure(pipe, prompts, policy, arguments.runs))
        if not arguments.json:
            print(line(found[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"machine": cpu, "arguments": vars(arguments), "policies": found}, indent=1))
    return 0 if all(one["num_changed"] == 0 for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
