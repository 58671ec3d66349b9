"""Ratios of the engine to its naive twin, and of a method to the full run: a program, as shape checks cost time too.

The three take turns in one process with one thread, and time is that of the processor, so a busy second core hardly
counts. `JAXTYPING_DISABLE=1 python -m tests.engine.speed` prints the ratios of a machine as JSON.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from foveate.core.guidance import GuidanceSchedule
from foveate.engine.executor import Engine
from foveate.engine.sample import Filter, KeyedSampler
from foveate.engine.state import Request
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from tests.engine.naive import generate
from tests.toys import Toy

ROUNDS = 5
SEED = 7

Ratios = dict[str, float]


def sides() -> dict[str, Callable[[], object]]:
    """One image of the small bundled model each, by the twin, by the engine, and by the engine under a policy."""
    model = Pipeline.from_pretrained("emoji-tiny").model
    schedule = model.spec.default_schedule
    toy = Toy(name="emoji-tiny", model=model.transformer, tokenizer=model.tokenizer, schedule=schedule)
    count = len(schedule)
    request = Request(
        schedule=schedule,
        guidance=GuidanceSchedule.from_infinity(2.5, count),
        temperatures=(1.0,) * count,
        filters=(Filter(top_k=1, top_p=0.0),) * count,
        sampler=KeyedSampler(seeds=(SEED,)),
        conditions=tuple(model.text.encode(["a red apple"])),
        num_images=1,
    )
    engine = Engine(model.transformer, model.tokenizer)

    def by_engine(spec: str) -> Callable[[], object]:
        bound = load_policy(spec).bind(schedule, model.transformer.shape)
        return lambda: list(engine.run(bound, request))

    return {
        "naive": lambda: generate(toy, request, [SEED]),
        "full": by_engine("full"),
        "ld-pruning": by_engine("ld-pruning"),
    }


def measured() -> Ratios:
    """Medians over rounds of the ratios of processor time."""
    ways = sides()
    for run in ways.values():
        run()
    rounds = []
    for number in range(ROUNDS):
        seconds = {}
        for name in (list(ways), list(reversed(ways)))[number % 2]:
            began = time.process_time()
            ways[name]()
            seconds[name] = time.process_time() - began
        rounds.append(seconds)
    return {
        f"{ours} / {theirs}": statistics.median(seconds[ours] / seconds[theirs] for seconds in rounds)
        for ours, theirs in (("full", "naive"), ("ld-pruning", "full"))
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.disable()
    sys.stdout.write(json.dumps(measured()) + "\n")
