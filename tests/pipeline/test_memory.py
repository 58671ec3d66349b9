"""The memory model against what a process really takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from foveate.families.memory import memory_need
from foveate.families.published import PUBLISHED
from foveate.policies.full import Full
from foveate.policies.skip_scales import SkipScales

# Runs alone in a process whose allocator gives everything back at once, and notes the most that it held.
MEASURE = """
import json, os, sys, threading, time
from dataclasses import replace
import torch
from foveate.families.loading import Origin, load_model
from foveate.families.published import PUBLISHED
from foveate.pipeline import Pipeline

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak_of(call):
    base, peak, stop = held(), [0], threading.Event()
    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], held())
            time.sleep(0.0003)
    thread = threading.Thread(target=watch)
    thread.start()
    value = call()
    stop.set()
    thread.join()
    return value, peak[0] - base

entry = PUBLISHED["infinity-125m"]
spec = replace(entry.spec, transformer=replace(entry.spec.transformer, depth=2, chunks=1), budgets=("0.06M",))
PUBLISHED["infinity-125m"] = replace(entry, spec=spec)
pipe = Pipeline.from_pretrained("infinity-125m", weights="random", dtype=sys.argv[1])
draw = lambda: pipe.generate("a cat", seed=1, num_images_per_prompt=4, output_type="latent").images
draw()
latent, run = peak_of(draw)
_, decoder = peak_of(lambda: pipe.model.tokenizer.decode(latent[:1]))
print(json.dumps([run, decoder]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_says_what_a_process_takes(dtype: torch.dtype) -> None:
    spec = PUBLISHED["infinity-125m"].spec
    spec = replace(spec, transformer=replace(spec.transformer, depth=2, chunks=1), budgets=("0.06M",))
    need = memory_need(spec, dtype, Full(), num_images=4)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(dtype).removeprefix("torch.")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    run, decoder = json.loads(done.stdout)
    assert run == pytest.approx(need.kv + need.blocks, rel=0.4)
    assert decoder == pytest.approx(need.decoder, rel=0.4)


def test_targets_of_the_large_models() -> None:
    assert memory_need(PUBLISHED["infinity-2b"].spec, torch.bfloat16, Full()).peak < 12e9
    full, skipped = (memory_need(PUBLISHED["infinity-2b"].spec, torch.bfloat16, p) for p in (Full(), SkipScales()))
    assert skipped.kv < full.kv
    assert skipped.transformer == full.transformer
