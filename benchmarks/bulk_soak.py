"""Kills a bulk run at random moments until it is done, and compares every image with the pipeline alone.

    python benchmarks/bulk_soak.py --output benchmarks/results/bulk_soak.json
    python benchmarks/bulk_soak.py --rows 100 --kills 2 --memory-rows 0 --rounds 1

Three parts: `kill -9` of `foveate batch` at moments from a seed, after each of which every shard that is visible must
be whole; images a second of `foveate batch` beside `foveate bench throughput`, in turns; and memory of a long run. Exit
code 1 if anything does not hold.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image

from foveate.bench.machine import describe_machine
from foveate.bulk.output import OutputFolder
from foveate.bulk.tasks import seed_of
from foveate.pipeline.pipeline import Pipeline

PROMPTS = ("green apple", "owl", "rocket", "watermelon", "top hat", "zebra", "sailboat", "taco")
POLICIES = (
    "skip-scales:count=2",
    "drop-branch:count=4|skip-scales:count=2",
    "skip-scales:count=3",
    "ld-pruning:sats=false|skip-scales",
)
DTYPE = "bfloat16"
_SAID = 20
_LEAST_RATIO = 0.95
_MEMORY = 0.05


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows of several policies; some share a prompt."""
    return [
        {"id": f"r{i}", "prompt": f"{PROMPTS[i % len(PROMPTS)]}", "policy": POLICIES[(i // 7) % len(POLICIES)]}
        for i in range(count)
    ]


def command(rows: Path, out: Path, model: str, *more: str) -> list[str]:
    """One `foveate batch`."""
    flags = ["-o", str(out), "-m", model, "--dtype", DTYPE, "--json", "--quiet"]
    return [sys.executable, "-m", "foveate", "batch", str(rows), *flags, *more]


@contextmanager
def started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is killed as a whole."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def done(out: Path) -> int:
    """Images and failures that survive a kill at this moment."""
    if not (out / "run.json").is_file():
        return 0
    output = OutputFolder.read(out)
    published = output.published()
    found = sum(1 for _ in output.entries(sorted(published)))
    waiting = {int(path.name.partition(".")[0]) for path in (out / ".work").glob("*.journal")} - published
    for number in waiting:
        with output.shard(number) as shard:
            found += len(shard.done)
    return found


def killed(arguments: Sequence[str], out: Path, least: int, delay_s: float) -> bool:
    """Starts a run and kills it a moment after so many images are done; whether it was still running."""
    with started(arguments) as process:
        while process.poll() is None and done(out) < least:
            time.sleep(0.05)
        time.sleep(delay_s)
        was_running = process.poll() is None
        if was_running:
            os.killpg(process.pid, signal.SIGKILL)
    return was_running


def visible_problems(out: Path) -> list[str]:
    """Shards that are visible and not whole."""
    found = []
    for path in sorted(out.glob("shard-*.tar")):
        try:
            with tarfile.open(path) as shard:
                names = [member.name for member in shard]
        except (tarfile.TarError, OSError) as error:
            found.append(f"{path.name}: {error}")
            continue
        if len(names) % 3:
            found.append(f"{path.name}: {len(names)} members are no whole samples")
    return found


def compared(out: Path, rows: Sequence[dict[str, Any]], model: str) -> list[str]:
    """Every image beside the pipeline's own."""
    output, pipe = OutputFolder.read(out), Pipeline.from_pretrained(model, dtype=DTYPE)
    entries = list(output.entries())
    problems = []
    logging.getLogger("foveate").setLevel(logging.ERROR)
    if [entry["id"] for entry in entries] != [row["id"] for row in rows]:
        problems.append(f"{len(entries)} entries of {len(rows)} rows, or another order")
    for entry, row in zip(entries, rows, strict=False):
        (expected,) = pipe(row["prompt"], seed=seed_of(0, row["id"]), policy=row["policy"], output_type="np").images
        content = output.content(entry)
        with Image.open(io.BytesIO(content)) as image:
            if not np.array_equal(np.asarray(image), expected):
                problems.append(f"{row['id']}: other pixels than those of the pipeline")
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            problems.append(f"{row['id']}: sha256 of the manifest does not fit")
    return problems


def regenerated(out: Path, draws: random.Random, count: int) -> list[str]:
    """Some images, generated again by the command line from their own files."""
    output = OutputFolder.read(out)
    entries = list(output.entries())
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in draws.sample(entries, min(count, len(entries))):
            path = Path(folder, f"{entry['id']}.png")
            path.write_bytes(output.content(entry))
            ran = subprocess.run(
                [sys.executable, "-m", "foveate", "generate", "--from", str(path), "-o", folder, "--json"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if ran.returncode != 0 or not json.loads(ran.stdout)["identical"]:
                problems.append(f"{entry['id']}: {ran.stderr.strip() or 'other pixels from the command line'}")
    return problems


def survived(folder: Path, model: str, num_rows: int, kills: int, seed: int) -> dict[str, Any]:
    """The run that is killed."""
    rows, draws, out = rows_of(num_rows), random.Random(seed), folder / "killed"
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = command(path, out, model, "--shard-size", str(max(1, num_rows // 8)))
    problems, landed = [], 0
    for least in sorted(draws.sample(range(1, num_rows), kills)):
        landed += killed(arguments, out, least, draws.uniform(0, 1))
        problems += visible_problems(out)
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        return {"kills": landed, "problems": [*problems, ran.stderr.strip()]}
    last = json.loads(ran.stdout)["images"]
    problems += visible_problems(out) + compared(out, rows, model) + regenerated(out, draws, _SAID)
    left = [str(path) for path in (out / ".work").glob("*") if path.suffix in (".journal", ".part")]
    return {"kills": landed, "images": num_rows, "images_of_the_last_process": last, "problems": problems + left}


def throughput(folder: Path, model: str, num_rows: int, rounds: int) -> dict[str, Any]:
    """Images a second of both commands, in turns; loading is in neither."""
    path = folder / "full.jsonl"
    path.write_text("".join(f'{{"prompt": "{PROMPTS[i % len(PROMPTS)]}"}}\n' for i in range(num_rows)))
    batch = "16"
    bench = [
        sys.executable, "-m", "foveate", "bench", "throughput", "-m", model, "--dtype", DTYPE, "--batch", batch,
        "--policy", "full", "--runs", str(max(1, num_rows // 16)), "--json",
    ]  # fmt: skip
    ours, theirs = [], []
    for index in range(rounds):
        arguments = command(path, folder / f"speed-{index}", model, "--batch-size", batch)
        ours.append(_ran(arguments)["images_per_s"])
        (case,) = _ran(bench)["cases"]
        theirs.append(case["policies"][0]["images_per_s"])
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return {"images_per_s": ours, "bench_images_per_s": theirs, "ratio": median(ratios), "ratios": ratios}


def memory(folder: Path, model: str, num_rows: int) -> dict[str, Any]:
    """Resident memory of a long run of the cheapest policy: the second fifth of its time against the last."""
    path = folder / "many.jsonl"
    path.write_text("".join(f'{{"prompt": "{PROMPTS[i % len(PROMPTS)]} {i}"}}\n' for i in range(num_rows)))
    arguments = command(path, folder / "many", model, "--policy", "skip-scales:count=4")
    samples: list[int] = []
    with started(arguments) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            samples += [1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
            time.sleep(0.5)
    fifth = max(1, len(samples) // 5)
    first, last = fmean(samples[fifth : 2 * fifth]), fmean(samples[-fifth:])
    return {"rows": num_rows, "first_bytes": first, "last_bytes": last, "change": last / first}


def _ran(arguments: Sequence[str]) -> dict[str, Any]:
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        sys.exit(f"{' '.join(arguments)}: {ran.stderr}")
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


def main() -> int:
    """Runs and says it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--rows", type=int, default=2000, help="of the run that is killed; 0 leaves it out")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the comparison with bench throughput; 0 leaves it out"
    )
    parser.add_argument("--speed-rows", type=int, default=480, help="of each round of that")
    parser.add_argument("--memory-rows", type=int, default=10_000, help="0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    flags = ("model", "rows", "kills", "rounds", "speed_rows", "memory_rows", "seed")
    words = [f"--{name.replace('_', '-')} {getattr(given, name)}" for name in flags]
    command = " ".join(["python benchmarks/bulk_soak.py", *words])
    found: dict[str, Any] = {"command": command, "machine": describe_machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks: dict[str, bool] = {}
        if given.rows:
            found["killed"] = survived(folder, given.model, given.rows, given.kills, given.seed)
            checks["every image is there once, with the pixels of the pipeline"] = not found["killed"]["problems"]
        if given.rounds:
            found["throughput"] = throughput(folder, given.model, given.speed_rows, given.rounds)
            checks["95 % of bench throughput"] = found["throughput"]["ratio"] >= _LEAST_RATIO
        if given.memory_rows:
            found["memory"] = memory(folder, given.model, given.memory_rows)
            checks["memory within 5 %"] = abs(found["memory"]["change"] - 1) <= _MEMORY
    found = {"holds": all(checks.values()), "checks": checks, **found}
    text = json.dumps(found, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(f"{text}\n", encoding="utf-8")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
