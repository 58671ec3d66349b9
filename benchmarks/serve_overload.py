"""Sends a server 1.5 times the requests that it can serve, and checks that it stays bounded and loses nothing.

    python benchmarks/serve_overload.py --seconds 300 --output benchmarks/results/serve_overload.json
    python benchmarks/serve_overload.py --seconds 30

A closed loop of eight clients first says what it can serve, for a minute at most; an open loop (Poisson) follows. The
measures are those of `foveate bench serve --load 1.5`. Exit code 1 if a check does not hold.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from foveate.bench.load import Calls
from foveate.bench.load_report import LoadReport, summary
from foveate.bench.load_server import started
from foveate.bench.machine import describe_machine
from foveate.bench.serve import LoadPlan, run_load

PROMPTS = ("green apple", "owl", "a red apple on a table, in the style of an emoji", "rocket")
_LOAD, _CLIENTS, _QUEUE = 1.5, 8, 16
_LEAST_GOODPUT, _MEMORY_CHANGE = 0.9, 0.05
"""Of what the closed loop completes, and of the memory behind the warm-up."""
_IS_LONG_S = 200.0
"""A shorter run sees caches and the queue fill; its memory and refusals are reported and not judged."""


def checked(report: LoadReport, seconds: float) -> dict[str, bool]:
    """What must hold, and whether it does."""
    found = summary(report.sides[-1][0], None)
    requests, server = found["requests"], found["server"]
    share = report.against_first()[0]["images_per_s"]["median"]
    long = {
        "some requests were refused": requests["refused"] > 0,
        "memory within 5 %": abs(server["resident_change"] - 1) <= _MEMORY_CHANGE,
    }
    return {
        "every request was completed or refused": requests["failed"] == 0,
        "no restarts": server["restarts"] == 0,
        "the queue is bounded": server["queue_images_max"] <= _QUEUE,
        "at least 90 % of the closed loop's images a second": share >= _LEAST_GOODPUT,
        **(long if seconds > _IS_LONG_S else {}),
    }


def measured(model: str, seconds: float, command: str) -> dict[str, Any]:
    """Runs the load; what came of it."""
    plan = LoadPlan(
        calls=Calls(prompts=PROMPTS, policies=("full",), partials=1),
        concurrency=(_CLIENTS,),
        rate=None,
        load=_LOAD,
        seconds=seconds,
        count=100_000,
        runs=1,
        warmup=1,
        goal_ms=None,
        timeout_s=120.0,
        command=command,
    )
    with started(["--model", model, "--log-level", "error", "--max-queue", str(_QUEUE)]) as server:
        report = run_load(server.url, None, plan)
    checks = checked(report, seconds)
    return {"holds": all(checks.values()), "checks": checks, **report.to_json()}


def main() -> int:
    """Runs and says it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of the open loop")
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    command = f"python benchmarks/serve_overload.py --seconds {given.seconds:g} --model {given.model}"
    found = {"machine": describe_machine(), **measured(given.model, given.seconds, command)}
    text = json.dumps(found, indent=1)
    print(text)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(f"{text}\n", encoding="utf-8")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
