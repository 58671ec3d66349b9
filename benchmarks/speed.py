"""Does a saving reach the clock?

Measured speed-up of the transformer beside the FLOP ratio, alternating in one process.

    python benchmarks/speed.py --model infinity-125m --weights random --pixels 0.25M --runs 3

Every round runs the full policy and then each other one; the first round warms up and is not counted. The ratio of a
policy is the median over rounds of full time / policy time within the round. Text encoder and decoder are excluded.
"""

import argparse
import json
import platform
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pages import fill_pages

from foveate.pipeline import Pipeline
from foveate.policies.registry import load_policy

POLICIES = ("ld-pruning", "ld-pruning:sats=false", "depthvar", "skip-scales", "drop-branch:count=3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One policy: medians over the counted rounds."""

    policy: str
    transformer_ms: float
    spread_ms: float
    speedup: float
    flop_ratio: float
    share: float
    """Measured speed-up over the one that the FLOPs promise."""

    def line(self) -> str:
        """A line of the Markdown table."""
        return (
            f"| `{self.policy}` | {self.transformer_ms:.0f} | {self.spread_ms:.0f} | {self.speedup:.2f}x | "
            f"{self.flop_ratio:.2f}x | {100 * self.share:.0f} % |"
        )


HEADER = "| policy | transformer ms | spread ms | speed-up | FLOP ratio | reached |\n|---|---|---|---|---|---|"


def measure(pipe: Pipeline, policies: list[str], prompt: str, runs: int, **call: Any) -> list[Row]:
    """Runs the rounds and returns one row per policy, the full one first."""
    specs = ["full", *policies]
    times: dict[str, list[float]] = {spec: [] for spec in specs}
    flops: dict[str, int] = {}
    for round_index in range(runs + 1):
        for spec in specs:
            report = pipe.generate(
                prompt, seed=round_index, policy=load_policy(spec), output_type="latent", **call
            ).report
            flops[spec] = report.flops_run
            if round_index:
                times[spec].append(report.ms.transformer)
    rows = []
    for spec in specs:
        speedups = [full / own for full, own in zip(times["full"], times[spec], strict=True)]
        speedup, ratio = statistics.median(speedups), flops["full"] / flops[spec]
        rows.append(
            Row(
                policy=spec,
                transformer_ms=statistics.median(times[spec]),
                spread_ms=max(times[spec]) - min(times[spec]),
                speedup=speedup,
                flop_ratio=ratio,
                share=speedup / ratio,
            )
        )
    return rows


def main() -> None:
    """Prints a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="infinity-125m")
    parser.add_argument("--weights", default="random", choices=["random", "pretrained"])
    parser.add_argument("--pixels", default="0.25M")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fill", action="store_true", help="put the table into the README")
    given = parser.parse_args()
    pipe = Pipeline.from_pretrained(given.model, weights=given.weights, dtype=given.dtype, device=given.device)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red apple on a wooden table in the morning light"
    rows = measure(pipe, given.policy or list(POLICIES), prompt, given.runs, pixels=given.pixels)
    if given.json:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        print(json.dumps({"machine": machine, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}))
        return
    table = "\n".join([HEADER, *(row.line() for row in rows)])
    print(table)
    if given.fill:
        fill_pages({"speed": table})


if __name__ == "__main__":
    main()
