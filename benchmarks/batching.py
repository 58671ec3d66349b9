"""What a batch is worth, and what it changes: pictures per second, and which pictures differ from the same ones alone.

Sixteen prompts, one seed each, drawn three ways in turns: one call per picture, one call for all, and one call for all
with `batch_invariant=True`. Transformer, decoder and text encoder together.

    python benchmarks/batching.py --dtype bfloat16 --runs 3
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
from foveate.eval.fidelity import psnr
from foveate.kernels import native
from foveate.pipeline import Pipeline, stack_uint8
from foveate.pipeline_options import Options

POLICIES = ("full", "ld-pruning", "ld-pruning:sats=false", "depthvar", "drop-branch")
WAYS = ("alone", "batch", "batch_invariant")
PROMPTS = Path(__file__).parent / "prompts.txt"


def draw(pipe: Pipeline, prompts: list[str], policy: str, way: str) -> tuple[np.ndarray, float]:
    """All pictures as bytes (n, height, width, 3), and milliseconds."""
    seeds = list(range(len(prompts)))
    if way != "alone":
        options = Options(policy=policy, output_type="np", batch_invariant=way == "batch_invariant", seed=seeds)
        output = pipe.generate(prompts, **options)
        return stack_uint8(output.images), output.report.ms.total
    singles = [Options(policy=policy, output_type="np", seed=seed) for seed in seeds]
    outputs = [pipe.generate(prompt, **options) for prompt, options in zip(prompts, singles, strict=True)]
    return np.concatenate([stack_uint8(o.images) for o in outputs]), sum(o.report.ms.total for o in outputs)


def measure(pipe: Pipeline, prompts: list[str], policy: str, runs: int) -> dict[str, Any]:
    """One policy, the three ways in turns."""
    rounds = alternate(
        lambda side, _: draw(pipe, prompts, policy, WAYS[side]), 3, runs=runs, warmup=1, after_round=lambda: None
    )
    pictures = {way: rounds.of(side)[0][0] for side, way in enumerate(WAYS)}
    ms = {way: [one[1] for one in rounds.of(side)] for side, way in enumerate(WAYS)}
    changed = [i for i in range(len(prompts)) if (pictures["batch"][i] != pictures["alone"][i]).any()]
    distances = psnr(pictures["batch"][changed], pictures["alone"][changed]) if changed else np.empty(0)
    speedup = {
        way: Spread.of([alone / other for alone, other in zip(ms["alone"], ms[way], strict=True)]).to_json()
        for way in WAYS[1:]
    }
    return {
        "policy": policy,
        "images_per_s": {way: 1e3 * len(prompts) / Spread.of(ms[way]).median for way in WAYS},
        "speedup": speedup,
        "share_changed": len(changed) / len(prompts),
        "psnr_of_changed": {"mean": float(distances.mean()), "min": float(distances.min())} if changed else None,
        "batch_invariant_is_exact": bool((pictures["batch_invariant"] == pictures["alone"]).all()),
    }


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    rates = " | ".join(f"{found['images_per_s'][way]:.1f}" for way in WAYS)
    gain = found["speedup"]["batch"]
    far = found["psnr_of_changed"]
    changed = f"{100 * found['share_changed']:.0f} %" + (
        f" ({far['mean']:.0f} dB, least {far['min']:.0f})" if far else ""
    )
    exact = "yes" if found["batch_invariant_is_exact"] else "no"
    spread = f"{gain['median']:.2f}x ({gain['p10']:.2f}-{gain['p90']:.2f})"
    return f"| `{found['policy']}` | {rates} | {spread} | {changed} | {exact} |"


def main() -> int:
    """Prints a table, or JSON; 1 if a picture differs where it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = Pipeline.from_pretrained("emoji", dtype=arguments.dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(read_prompt_file(PROMPTS))[: arguments.batch]
    cpu = describe_machine()["cpu"]
    if not arguments.json:
        print(
            f"emoji, {len(prompts)} pictures, {arguments.dtype}, {cpu['name']}, {arguments.threads} threads, "
            f"kernels: {native.describe()}\n"
        )
        print("| policy | alone /s | batch /s | batch_invariant /s | batch over alone | changed by the batch | exact |")
        print("|---|---|---|---|---|---|---|")
    found = []
    for policy in POLICIES:
        found.append(measure(pipe, prompts, policy, arguments.runs))
        if not arguments.json:
            print(line(found[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"machine": cpu, "arguments": vars(arguments), "policies": found}, indent=1))
    return 0 if all(one["batch_invariant_is_exact"] for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
