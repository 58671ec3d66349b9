"""Load on a server: when requests are due, what is read of an answer, and the figures that come of it."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.bench.load import NOT_SENT, Calls, Phase, PhaseRun, Shot, arrivals, run_phase
from foveate.bench.load_client import _events, ask
from foveate.bench.load_plot import draw_load
from foveate.bench.load_report import LoadReport, markdown, notes, percentiles, server_summary, summary, table
from foveate.bench.load_server import Sample, parsed, started
from foveate.bench.serve import LoadPlan, run_load
from foveate.core.errors import FoveateError

STREAM = b"""event: image_generation.partial_image\r\ndata: {"b64_json": "AAAA"}\r\n\r\n: ping\r\n\r\n\
event: image_generation.completed\r\ndata: {"b64_json": "BBBB"}\r\n\r\n"""
ERROR = b'event: error\r\ndata: {"type": "error", "error": {"message": "no", "code": "late"}}\r\n\r\n'
METRICS = b'# HELP x\nprocess_resident_memory_bytes 2e6\nfoveate_queue_images 3\nother{a="b"} 1\n'


class Peer(BaseHTTPRequestHandler):
    """A server of a few lines that answers as the seed of a request says, so that every way to end can be had."""

    def do_GET(self) -> None:
        self.reply(200, METRICS if self.path == "/metrics" else b'{"status": "ready"}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append((body, self.headers.get("authorization")))
        time.sleep(self.server.seconds)
        seed = body["seed"] % 1000
        if seed == 429:
            self.reply(429, b'{"error": {"message": "full", "code": "queue_full"}}')
        elif seed == 500:
            self.reply(500, b"broken")
        else:
            self.reply(200, {1: ERROR, 2: STREAM[:40]}.get(seed, STREAM))

    def reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def peer() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Peer) as server:
        server.bodies, server.seconds = [], 0.0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(peer: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{peer.server_address[1]}"


def loaded(peer: ThreadingHTTPServer, phase: Phase, calls: Calls, first: int = 0) -> PhaseRun:
    async def run() -> PhaseRun:
        async with httpx2.AsyncClient(base_url=address(peer), timeout=5) as client:
            return await run_phase(client, phase, calls, first)

    return asyncio.run(run())


def test_arrivals_are_a_poisson_process_of_a_seed_and_bounded() -> None:
    phase = Phase(seconds=200.0, count=10_000, rate=20.0, seed=3)
    times = list(arrivals(phase))
    assert times == list(arrivals(phase)) != list(arrivals(replace(phase, seed=4)))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(4000, rel=0.05)
    # The spread of an exponential distribution is its mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert max(times) < 200
    assert len(list(arrivals(replace(phase, count=7)))) == 7


@given(cuts=st.lists(st.integers(1, len(STREAM + ERROR) - 1), max_size=8))
def test_events_are_read_wherever_chunks_end(cuts: list[int]) -> None:
    content = STREAM + ERROR

    async def chunks() -> AsyncIterator[bytes]:
        for first, last in pairwise([0, *sorted(cuts), len(content)]):
            yield content[first:last]

    async def read() -> list[tuple[bytes, bytes]]:
        return [event async for event in _events(chunks())]

    names = [name for name, _ in asyncio.run(read())]
    assert names == [b"image_generation.partial_image", b"image_generation.completed", b"error"]


@pytest.mark.parametrize(
    ("seed", "status", "error", "images"),
    [
        (0, 200, None, 1),
        (1, 200, "late", 0),
        (2, 200, "ended early", 0),
        (429, 429, "queue_full", 0),
        (500, 500, "not in the envelope", 0),
    ],
)
def test_every_way_to_end_is_an_answer(
    peer: ThreadingHTTPServer, seed: int, status: int, error: str | None, images: int
) -> None:
    async def one() -> Any:
        async with httpx2.AsyncClient(base_url=address(peer), timeout=5) as client:
            return await ask(client, {"seed": seed, "n": 1}, lambda: 4.0)

    answer = asyncio.run(one())
    assert (answer.status, answer.error, answer.images) == (status, error, images)
    assert (answer.first_s == 4.0) is (seed == 0)


def test_no_server_at_all_is_an_answer_too() -> None:
    async def one() -> Any:
        async with httpx2.AsyncClient(base_url="http://127.0.0.1:9", timeout=5) as client:
            return await ask(client, {"seed": 0, "n": 1}, lambda: 0.0)

    answer = asyncio.run(one())
    assert (answer.status, answer.error) == (0, "ConnectError")


def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does(peer: ThreadingHTTPServer) -> None:
    peer.seconds = 0.1
    calls = Calls(prompts=("a", "b"), policies=("full", None), sizes=("64x64",), seed=10)
    run = loaded(peer, Phase(seconds=5.0, count=20, rate=200.0, seed=1), calls, first=3)
    assert len(run.shots) == 20
    assert sum(a.sent_s < b.done_s for a, b in pairwise(sorted(run.shots, key=lambda shot: shot.sent_s))) == 19
    assert 0.1 < run.end_s < 1.5
    bodies = sorted((body for body, _ in peer.bodies), key=lambda body: body["seed"])
    assert [body["seed"] for body in bodies] == list(range(13, 33))
    assert [body["prompt"] for body in bodies[:2]] == ["b", "a"]
    assert "policy" not in bodies[0]
    assert (bodies[1]["policy"], bodies[1]["size"], bodies[1]["n"]) == ("full", "64x64", 1)
    assert run.samples[0].queue_images == 3
    run = loaded(peer, Phase(seconds=5.0, count=6, concurrency=2), calls)
    most = max(sum(a.sent_s <= b.sent_s < a.done_s for a in run.shots) for b in run.shots)
    assert (len(run.shots), most) == (6, 2)
    assert run.end_s > 0.3
    run = loaded(peer, Phase(seconds=0.35, count=100, concurrency=1), calls)
    assert 2 <= len(run.shots) <= 4


def shot(due_s: float, took_s: float, **more: Any) -> Shot:
    defaults = {"sent_s": due_s, "first_s": due_s + took_s / 4, "status": 200, "images": 1, "error": None}
    return Shot(**{"due_s": due_s, "done_s": due_s + took_s, **defaults, **more})


def phase_run(shots: list[Shot], end_s: float, **phase: Any) -> PhaseRun:
    asked = Phase(seconds=end_s, count=1000, **phase)
    samples = tuple(
        Sample(at_s=s, resident_bytes=100.0 + s, queue_images=s, restarts=0.0, cpu_s=s / 2)
        for s in (0.0, 1.0, 5.0, 9.0)
    )
    return PhaseRun(phase=asked, shots=tuple(shots), samples=samples, end_s=end_s, client_cpu_share=0.25)


def test_figures_of_a_phase_leave_the_warm_up_out() -> None:
    """Ten seconds, a request each half second that takes one second; those of the first second took far longer."""
    shots = [shot(0.2, 9.0), shot(0.6, 9.0), *(shot(1.0 + i / 2, 1.0) for i in range(18))]
    shots += [
        shot(5.0, 0.01, status=429, images=0, error="queue_full", first_s=None),
        shot(5.0, 0.0, status=NOT_SENT, images=0, first_s=None),
        shot(5.0, 0.5, status=0, images=0, error="ReadError", first_s=None),
        shot(5.0, 0.5, images=0, error="late", first_s=None),
    ]
    found = summary(phase_run(shots, 10.0, rate=2.0), goal_ms=500.0)
    assert found["requests"] == {
        "due": 24, "completed": 20, "refused": 1, "not_sent": 1, "failed": 2,
        "errors": {"0 ReadError": 1, "200 late": 1},
    }  # fmt: skip
    assert found["completion_ms"] == {"p50": pytest.approx(1000), "p95": None, "p99": None, "n": 18}
    assert found["first_partial_ms"]["p50"] == pytest.approx(250)
    # Those that were done between 1 s and 10 s, two of them from the warm-up.
    assert found["images_per_s"] == pytest.approx((2 + 17) / 9)
    assert found["goodput_per_s"] == 0
    assert found["refusal_ms"]["n"] == 1
    assert found["server"]["cores"] == pytest.approx(0.5)
    assert found["server"]["resident_change"] == pytest.approx(109 / 101)
    assert found["server"]["queue_images_max"] == 9


def test_percentiles_need_enough_values() -> None:
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None, "n": 0}
    found = percentiles([float(value) for value in range(101)])
    assert found == {"p50": 50, "p95": 95, "p99": 99, "n": 101}
    assert percentiles([1.0] * 99)["p99"] is None
    assert server_summary((), 0.0) is None


def test_sides_are_compared_round_by_round(tmp_path: Path) -> None:
    lone = phase_run([shot(1.0 + i, 1.0) for i in range(9)], 10.0, concurrency=1)
    eight = phase_run([shot(1.0 + i / 4, 2.0) for i in range(36)], 10.0, concurrency=8)
    facts = {
        "command": "foveate bench serve",
        "machine": {"versions": {"torch": "1"}, "cpu": {"name": "c", "cores": 2}},
    }
    facts |= {"server": {"ready": {}}, "method": ["so"]}
    report = LoadReport(sides=((lone, lone), (eight, eight)), goal_ms=None, images=1, facts=facts)
    (ratio,) = report.to_json()["against_first"]
    assert (ratio["side"], ratio["against"]) == ("8 at a time", "1 at a time")
    assert ratio["images_per_s"]["median"] == pytest.approx(29 / 9)
    assert ratio["first_partial"]["median"] == pytest.approx(2)
    assert ratio["first_partial_of_completion"]["median"] == pytest.approx(0.5)
    columns, rows = table(report)
    assert [row[0] for row in rows] == ["1 at a time", "8 at a time"]
    assert dict(zip(columns, rows[1], strict=True))["done p50"] == "2000 ms"
    assert any("3.22x images/s" in value for _, value in notes(report))
    draw_load(report, tmp_path / "load.svg")
    assert (tmp_path / "load.svg").read_text().count("8 at a time") == 1
    assert "| 8 at a time |" in markdown(report, "load.svg")


def plan(**changes: Any) -> LoadPlan:
    """A short measurement."""
    settings = {
        "calls": Calls(prompts=("a",), seed=3), "concurrency": (2,), "rate": None, "load": None, "seconds": 0.5,
        "count": 100, "runs": 2, "warmup": 1, "goal_ms": None, "timeout_s": 5.0, "command": "foveate bench serve",
    }  # fmt: skip
    return LoadPlan(**{**settings, **changes})


def test_load_is_a_multiple_of_what_the_closed_loop_completes(peer: ThreadingHTTPServer) -> None:
    peer.seconds, heard = 0.05, list[str]()
    report = run_load(address(peer), "sk-1", plan(load=1.5), heard.append)
    closed, opened = report.sides
    for lone, load in zip(closed, opened, strict=True):
        capacity = summary(lone, None)["images_per_s"]
        assert load.phase.rate == pytest.approx(1.5 * capacity)
        assert load.phase.seed in (3, 4)
    assert (report.stopped, heard[0]) == (None, "warm-up")
    assert {key for _, key in peer.bodies} == {"Bearer sk-1"}
    assert "sk-1" not in json.dumps(report.to_json())
    assert len({body["seed"] for body, _ in peer.bodies}) >= len(peer.bodies) - 1


def test_ctrl_c_leaves_complete_rounds(peer: ThreadingHTTPServer) -> None:
    def stop(what: str) -> None:
        if what.startswith("round 2"):
            raise KeyboardInterrupt

    report = run_load(address(peer), None, plan(seconds=0.1), stop)
    assert (len(report.sides[0]), str(report.stopped)) == (1, "interrupted")


def test_a_server_that_refuses_the_first_request_ends_the_measurement(peer: ThreadingHTTPServer) -> None:
    with pytest.raises(FoveateError, match="answers 500 not in the envelope where images were asked for"):
        run_load(address(peer), None, plan(calls=Calls(prompts=("a",), seed=500)))


def test_metrics_are_read_by_name() -> None:
    sample = parsed("# TYPE a\nprocess_open_fds 7\nfoveate_queue_images 2.0\nprocess_open_fds_other 3\n", 1.5)
    assert sample == Sample(at_s=1.5, open_files=7.0, queue_images=2.0)
    page = 'foveate_queue_images{replica="a"} 2\nfoveate_queue_images{replica="b"} 3\nprocess_open_fds 4\n'
    assert parsed(page, 1.0) == Sample(at_s=1.0, open_files=4.0, queue_images=5.0)


@pytest.mark.soak
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(FoveateError, match="ended with code 2 before it was ready"), started(["--no-such-flag"]):
        pass


def test_an_open_loop_tells_what_its_requests_raise() -> None:
    async def closed() -> None:
        client = httpx2.AsyncClient(base_url="http://127.0.0.1:9")
        await client.aclose()
        await run_phase(client, Phase(seconds=0.1, count=1000, rate=100.0), Calls(prompts=("a cat",)), 0)

    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(closed())
