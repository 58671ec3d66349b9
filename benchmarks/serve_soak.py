"""Puts a random mix of requests and cancels on a server, and watches its memory, threads, sockets and files.

    python benchmarks/serve_soak.py --seconds 1200 --output benchmarks/results/serve_soak.json
    python benchmarks/serve_soak.py --seconds 60

Clients take calls from a seed: policies, partial images, several images, deadlines, requests that are refused, and
streams that are left before, while or after the first image comes. The same call always has the same pixels. Behind the
load the server must be as it was after the warm-up. Exit code 1 if anything of that does not hold.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from PIL import Image

from foveate.bench.load_client import PATH
from foveate.bench.load_server import Started, started
from foveate.bench.machine import describe_machine

PROMPTS = ("green apple", "owl", "a red apple on a table, in the style of an emoji", "rocket")
POLICIES = ("full", "preset-draft", "ld-pruning", "drop-branch:count=2", "skip-scales:count=2")
BAD = ({"prompt": ""}, {"size": "17x17"}, {"policy": "none-such"}, {"n": 10_000}, {"temperature": "hot"})
_OK = 200
_IDLE_S = 5.0
_JUDGES_MEMORY_S = 200.0
"""A shorter run sees caches fill; its memory is reported and not judged."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the process of the server holds at one moment."""

    at_s: float
    resident_bytes: int
    threads: int
    sockets: int
    files: int


def held(pid: int, at_s: float) -> Held:
    """Read from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except OSError:  # closed meanwhile
            continue
    return Held(
        at_s=at_s,
        resident_bytes=1024 * int(status["VmRSS"].split()[0]),
        threads=int(status["Threads"]),
        sockets=sum(target.startswith("socket:") for target in targets),
        files=len(targets),
    )


class Soak:
    """The state of one soak: a random source, what came, and what was held."""

    def __init__(self, server: Started, client: httpx2.AsyncClient, seed: int) -> None:
        self.server, self.client, self.draws = server, client, random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.pixels: dict[str, str] = {}
        self.broken: list[str] = []
        self.samples: list[Held] = []
        self.began = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.began

    def call(self) -> dict[str, Any]:
        """A body of a good request; few enough that each comes again and again."""
        body: dict[str, Any] = {
            "prompt": self.draws.choice(PROMPTS),
            "seed": self.draws.randrange(3),
            "policy": self.draws.choice(POLICIES),
            "n": self.draws.choice((1, 1, 1, 2)),
        }
        return body

    async def one(self) -> None:
        """One request of a random kind."""
        kind = self.draws.choices(("whole", "stream", "leave", "abort", "bad", "late"), (25, 25, 25, 10, 10, 5))[0]
        body = self.call()
        try:
            self.ends[await getattr(self, kind)(body)] += 1
        except httpx2.HTTPError as error:
            self.broken.append(f"{kind}: {type(error).__name__} {error}")

    async def whole(self, body: dict[str, Any]) -> str:
        """All images in one answer; their pixels must be those that the call always has."""
        response = await self.client.post(PATH, json=body)
        if response.status_code != _OK:
            return self.refused(response.status_code)
        self.compare(body, [entry["b64_json"] for entry in response.json()["data"]])
        return "whole"

    async def stream(self, body: dict[str, Any]) -> str:
        """A stream, read to its end."""
        images, body = [], {**body, "stream": True, "partial_images": self.draws.randrange(4)}
        async with self.client.stream("POST", PATH, json=body) as response:
            if response.status_code != _OK:
                return self.refused(response.status_code)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                if event["type"] == "error":
                    self.broken.append(f"stream: {event['error']}")
                if event["type"] == "image_generation.completed":
                    images.append((event["image_index"], event["b64_json"]))
        self.compare(body, [image for _, image in sorted(images)])
        return "stream"

    async def leave(self, body: dict[str, Any]) -> str:
        """A stream that is left after a few events."""
        body = {**body, "stream": True, "partial_images": 3}
        left = self.draws.randrange(4)
        async with self.client.stream("POST", PATH, json=body) as response:
            async for line in response.aiter_lines():
                left -= line.startswith("event: ")
                if left < 0:
                    return "left"
        return "left at the end"

    async def abort(self, body: dict[str, Any]) -> str:
        """A request whose client hangs up before the answer."""
        try:
            async with asyncio.timeout(self.draws.uniform(0, 1)):
                await self.client.post(PATH, json=body)
        except TimeoutError:
            return "aborted"
        return "answered before the abort"

    async def bad(self, body: dict[str, Any]) -> str:
        """A request that must be refused with 4xx."""
        response = await self.client.post(PATH, json={**body, **self.draws.choice(BAD)})
        if not 400 <= response.status_code < 500:
            self.broken.append(f"bad: status {response.status_code}")
        return "refused as wrong"

    async def late(self, body: dict[str, Any]) -> str:
        """A deadline that cannot be met, answered by an image or an error."""
        late = {"latency_budget_ms": self.draws.uniform(20, 400), "on_late": self.draws.choice(("coarse", "error"))}
        response = await self.client.post(PATH, json={**body, "policy": "full", **late})
        return f"late, {response.status_code}"

    def refused(self, status: int) -> str:
        """How a good request ended that was not served."""
        if status != 429:
            self.broken.append(f"a good request was answered by {status}")
        return f"refused, {status}"

    def compare(self, body: dict[str, Any], images: list[str]) -> None:
        """Checks the number of images, and their pixels against the first time that they came."""
        if len(images) != body["n"]:
            self.broken.append(f"{len(images)} images came of {body['n']}")
        for index, image in enumerate(images):
            with Image.open(io.BytesIO(base64.b64decode(image))) as picture:
                digest = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
            key = json.dumps([body["prompt"], body["policy"], body["seed"] + index])
            if self.pixels.setdefault(key, digest) != digest:
                self.broken.append(f"other pixels than before: {key}")

    async def watch(self) -> None:
        """Looks at the process once a second."""
        while True:
            self.samples.append(held(self.server.process.pid, self.now()))
            await asyncio.sleep(1)


async def settled(soak: Soak) -> tuple[Held, dict[str, float]]:
    """What is held when nothing runs: metrics that say so, and a few seconds behind it."""
    names = ("foveate_queue_images", "foveate_running_images", "foveate_restarts_total")
    for _ in range(300):
        lines = (await soak.client.get("/metrics")).text.splitlines()
        found = {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name in names}
        if found[names[0]] == found[names[1]] == 0:
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(_IDLE_S)
    return held(soak.server.process.pid, soak.now()), found


async def soaked(server: Started, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    """Runs the load; what came of it."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        soak = Soak(server, client, seed)
        # At once, so that every pool has all of its threads.
        warm_up = [{"prompt": PROMPTS[0], "seed": 0, "policy": policy, "n": 2} for policy in POLICIES]
        await asyncio.gather(*(soak.whole(body) for body in warm_up), *(soak.stream(body) for body in warm_up[:2]))
        before, _ = await settled(soak)
        soak.began = time.monotonic()
        watching = asyncio.create_task(soak.watch())

        async def runs() -> None:
            while soak.now() < seconds:
                await soak.one()

        await asyncio.gather(*(runs() for _ in range(clients)))
        watching.cancel()
        after, metrics = await settled(soak)
    return report(soak, before, after, metrics)


def report(soak: Soak, before: Held, after: Held, metrics: dict[str, float]) -> dict[str, Any]:
    """What was held before, meanwhile and after, and what does not hold."""
    # The first fifth is warm-up: caches of every policy and size are filled.
    warm = soak.samples[len(soak.samples) // 5 :]
    fifth = max(1, len(warm) // 5)
    first, last = (fmean(s.resident_bytes for s in part) for part in (warm[:fifth], warm[-fifth:]))
    is_idle = metrics["foveate_queue_images"] == metrics["foveate_running_images"] == 0
    checks = {
        **({"memory within 5 %": abs(last / first - 1) <= 0.05} if soak.now() > _JUDGES_MEMORY_S else {}),
        "threads as before": after.threads <= before.threads,
        "sockets as before": after.sockets <= before.sockets,
        "files as before": after.files <= before.files,
        "nothing is left in queue or progress": is_idle,
        "no restarts": metrics["foveate_restarts_total"] == 0,
        "every request was answered as it shall": not soak.broken,
    }
    return {
        "holds": all(checks.values()),
        "checks": checks,
        "requests": dict(sorted(soak.ends.items())),
        "calls_compared": len(soak.pixels),
        "broken": soak.broken[:20],
        "resident_bytes": {"first": first, "last": last, "change": last / first},
        "most": {name: max(getattr(s, name) for s in soak.samples) for name in ("threads", "sockets", "files")},
        "before": asdict(before),
        "after": asdict(after),
    }


def main() -> int:
    """Runs and says it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, behind the warm-up")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    with started(["--model", given.model, "--log-level", "error", "--max-queue", "16"]) as server:
        found = asyncio.run(soaked(server, given.seconds, given.clients, given.seed))
    command = (
        f"python benchmarks/serve_soak.py --seconds {given.seconds:g} --clients {given.clients} --seed {given.seed}"
    )
    text = json.dumps({"command": command, "machine": describe_machine(), **found}, indent=1)
    print(text)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(f"{text}\n", encoding="utf-8")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
