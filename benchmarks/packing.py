"""What packing gains: concurrent requests on the scheduler, beside one at a time and beside one packed call.

    python benchmarks/packing.py --model emoji-tiny --dtype bfloat16 --requests 8 --rounds 5 --output packing.json

The three take turns in one process, after a warm-up, so that a machine that slows down slows all of them; nothing of
HTTP is in it. Every image is compared with its solo run, bit by bit. Ratios are medians over the rounds with the
smallest and the largest.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from foveate.core.atomic import write_text
from foveate.core.errors import FoveateError
from foveate.pipeline.output import describe_kernels, processor_name
from foveate.pipeline.pipeline import Pipeline
from foveate.server.scheduler import Scheduler, SchedulerSettings
from foveate.server.work import Event, Failed, Finished, ImageDone, ScaleDone, Work

PROMPTS = (
    "a red apple",
    "a rocket",
    "a hamburger on a blue background",
    "two strawberries",
    "a cactus",
    "a yellow taxi cab",
    "a penguin",
    "a slice of pizza",
)


@dataclass(kw_only=True, slots=True)
class Heard:
    """One request: when its first partial image and its end came, in seconds from its submission, and its image."""

    began: float
    first_partial_s: float = 0.0
    done_s: float = 0.0
    image: np.ndarray | None = None
    over: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __call__(self, event: Event) -> None:
        """Keeps what counts."""
        now = time.perf_counter() - self.began
        if isinstance(event, ScaleDone) and event.partial == 0:
            self.first_partial_s = now
        elif isinstance(event, ImageDone):
            self.image = np.asarray(event.output.images[0])
        elif isinstance(event, Failed | Finished):
            self.error = event.error if isinstance(event, Failed) else None
            self.done_s = now
            self.over.set()


def requested(scheduler: Scheduler, works: Sequence[Work], *, at_once: bool) -> tuple[float, list[Heard]]:
    """Sends requests, all at once or each behind the one before; seconds until the last one is done."""
    began, heard = time.perf_counter(), []
    for work in works:
        heard.append(Heard(began=time.perf_counter()))
        scheduler.submit(work, heard[-1])
        if not at_once:
            heard[-1].over.wait()
    for each in heard:
        each.over.wait()
        if each.error is not None:
            raise each.error
    return time.perf_counter() - began, heard


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it gave."""
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def measure(pipe: Pipeline, prompts: Sequence[str], policy: str, rounds: int) -> dict[str, Any]:
    """All rounds; see the module."""
    seeds = list(range(len(prompts)))
    works = [
        Work(job=pipe.job(prompt, {"seed": seed, "policy": policy}), key=f"client-{seed % 2}", partials=3)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    plain = [Work(job=work.job, key=work.key) for work in works]
    pipe.set_progress_bar_config(disable=True)
    solo = [np.asarray(pipe(p, seed=s, policy=policy).images[0]) for p, s in zip(prompts, seeds, strict=True)]
    scheduler = Scheduler(pipe, SchedulerSettings(max_images=len(prompts)))
    scheduler.start()
    found: dict[str, list[float]] = {}
    is_equal = True
    try:
        scheduler.warm_up()
        for number in range(rounds + 1):
            packed_s, _ = timed(lambda: pipe(list(prompts), seed=seeds, policy=policy))
            lone_s, lone = requested(scheduler, plain, at_once=False)
            company_s, heard = requested(scheduler, plain, at_once=True)
            shown_s, shown = requested(scheduler, works, at_once=True)
            for each in (lone, heard, shown):
                pairs = zip(each, solo, strict=True)
                is_equal &= all(one.image is not None and np.array_equal(one.image, own) for one, own in pairs)
            if number:
                one_s = lone_s / len(prompts)
                figures = {
                    "over_one_at_a_time": lone_s / company_s,
                    "over_packed_call": packed_s / company_s,
                    "partials_cost": shown_s / company_s - 1,
                    "first_partial_of_lone": max(one.first_partial_s for one in shown) / one_s,
                    "images_per_s": len(prompts) / company_s,
                    "seconds_alone": one_s,
                }
                for name, value in figures.items():
                    found.setdefault(name, []).append(value)
    finally:
        scheduler.close(60)
    return {
        "requests": len(prompts),
        "rounds": rounds,
        "policy": policy,
        "identical_to_solo": is_equal,
        **{name: spread(values) for name, values in found.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints one JSON object; 1 if an image differs from its solo run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="full")
    parser.add_argument("--requests", type=int, default=len(PROMPTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    try:
        pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype, weights=options.weights)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(options.requests)]
        report = {
            "model": options.model,
            "dtype": options.dtype,
            "machine": processor_name(pipe.model.device),
            "threads": torch.get_num_threads(),
            "kernels": describe_kernels(pipe.model.device).partition(" ")[0],
            **measure(pipe, prompts, options.policy, options.rounds),
        }
    except FoveateError as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps(report, indent=1)
    if options.output is not None:
        write_text(options.output, text + "\n")
    print(text)
    return 0 if report["identical_to_solo"] else 1


if __name__ == "__main__":
    sys.exit(main())
