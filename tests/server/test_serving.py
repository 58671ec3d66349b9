"""The life of a server: it answers while it loads, warms up, and ends without losing what it accepted."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from foveate.server.scheduler import Scheduler, SchedulerSettings
from foveate.server.serving import Place, serve_locally
from foveate.server.settings import ServerSettings
from foveate.server.store import StoreSettings
from tests.server.conftest import PATH, PROMPT, TIMEOUT_S, Live, eventually


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(port: int, path: str = "/ready", body: Any = None) -> tuple[int, Any]:
    """Status and JSON; status 0 where nobody listens any more."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        return response.status, content.decode() if is_stream else json.loads(content)
    except OSError:
        return 0, None
    finally:
        connection.close()


def held(scheduler: Scheduler) -> int:
    """Images that wait or run."""
    stats = scheduler.stats()
    return stats.queued_images + stats.running_images


class Visitors:
    """Requests from other threads, while the main one serves."""

    def __init__(self, visit: Callable[[], object]) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.errors: list[BaseException] = []
        self._visit, self._others = visit, list[threading.Thread]()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._visit()
        except BaseException as error:
            self.errors.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    def send(self, port: int, body: Any) -> None:
        other = threading.Thread(target=lambda: self.answers.append(ask(port, PATH, body)))
        self._others.append(other)
        other.start()

    def wait(self) -> None:
        for thread in (self._thread, *self._others):
            thread.join(TIMEOUT_S)
        assert not self.errors, self.errors


@pytest.fixture
def safe_signals():
    """A signal that comes too late ends no test run."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("safe_signals")
def test_everything_accepted_is_finished(toy_pipe: Pipeline) -> None:
    port, may_load, seeds = free_port(), threading.Event(), range(3)
    schedulers: list[Scheduler] = []

    def load() -> tuple[Pipeline, Scheduler]:
        assert may_load.wait(TIMEOUT_S)
        schedulers.append(Scheduler(toy_pipe, SchedulerSettings(max_images=2)))
        return toy_pipe, schedulers[0]

    def visit() -> None:
        eventually(lambda: ask(port)[0] == 503, "it answers while it loads")
        assert ask(port)[1]["status"] == "loading"
        assert ask(port, PATH, {"prompt": PROMPT})[1]["error"]["code"] == "loading"
        may_load.set()
        eventually(lambda: ask(port)[0] == 200, "it is ready")
        for seed in seeds:
            visitors.send(port, {"prompt": PROMPT, "seed": seed, "stream": seed == 0})
        eventually(lambda: held(schedulers[0]) == len(seeds), "all are accepted")
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: schedulers[0].stats().is_closing, "it closes")
        late.append(ask(port, PATH, {"prompt": PROMPT}))

    late: list[tuple[int, Any]] = []
    visitors = Visitors(visit)
    was_done = serve_locally(load, ServerSettings(), Place(port=port, grace_s=TIMEOUT_S))
    visitors.wait()
    assert [status for status, _ in visitors.answers] == [200] * 3
    (stream,) = (body for _, body in visitors.answers if isinstance(body, str))
    assert "event: image_generation.completed" in stream
    assert late[0][0] in (0, 503)
    assert was_done
    assert not schedulers[0]._thread.is_alive()


@pytest.mark.usefixtures("safe_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_where_the_event_loop_takes_none(
    toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name in ("add_signal_handler", "remove_signal_handler"):
        # What is left raises NotImplementedError, as on Windows.
        monkeypatch.delattr(asyncio.SelectorEventLoop, name)
    port, before = free_port(), [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    def visit() -> None:
        eventually(lambda: ask(port)[0] == 200, "it is ready")
        os.kill(os.getpid(), number)

    visitors = Visitors(visit)
    scheduler = Scheduler(toy_pipe, SchedulerSettings())
    assert serve_locally(lambda: (toy_pipe, scheduler), ServerSettings(), Place(port=port, grace_s=TIMEOUT_S))
    visitors.wait()
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.usefixtures("safe_signals")
def test_a_check_that_takes_longer_than_the_grace_is_not_waited_for(toy_pipe: Pipeline) -> None:
    port, is_asked, may_end = free_port(), threading.Event(), threading.Event()

    def check(_prompt: str, _image: object) -> None:
        is_asked.set()
        may_end.wait(TIMEOUT_S)

    def visit() -> None:
        eventually(lambda: ask(port)[0] == 200, "it is ready")
        visitors.send(port, {"prompt": PROMPT})
        assert is_asked.wait(TIMEOUT_S)
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    began: list[float] = []
    visitors = Visitors(visit)
    settings = ServerSettings(moderation=check)
    serve_locally(lambda: (toy_pipe, Scheduler(toy_pipe, SchedulerSettings())), settings, Place(port=port, grace_s=0.5))
    seconds = time.monotonic() - began[0]
    visitors.wait()
    may_end.set()
    ((status, body),) = visitors.answers
    assert (status, body["error"]["code"]) == (503, "closing")
    assert seconds < 4
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("foveate-"))


@pytest.mark.usefixtures("safe_signals")
@pytest.mark.parametrize(("grace_s", "signals"), [(0.05, 1), (1.0, 1), (TIMEOUT_S, 2)])
def test_what_takes_longer_than_the_grace_is_answered(
    toy_pipe: Pipeline, tmp_path: Path, grace_s: float, signals: int
) -> None:
    port = free_port()
    schedulers: list[Scheduler] = []

    def load() -> tuple[Pipeline, Scheduler]:
        schedulers.append(Scheduler(toy_pipe, SchedulerSettings(max_images=1)))
        return toy_pipe, schedulers[0]

    def visit() -> None:
        eventually(lambda: ask(port)[0] == 200, "it is ready")
        visitors.send(port, {"prompt": PROMPT, "n": 10, "size": "512x512"})
        eventually(lambda: schedulers[0].stats().running_images > 0, "it works")
        began.append(time.monotonic())
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    began: list[float] = []
    visitors = Visitors(visit)
    settings = ServerSettings(store=StoreSettings(folder=tmp_path))
    assert not serve_locally(load, settings, Place(port=port, grace_s=grace_s))
    seconds = time.monotonic() - began[0]
    visitors.wait()
    ((status, body),) = visitors.answers
    if signals == 1:
        assert (status, body["error"]["code"]) == (503, "closing")
    assert status in (0, 503)
    assert seconds < 4, "a second and the end of a scale on a busy machine"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("safe_signals")
def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Any:
        raise FoveateError("no model 'x'")

    with pytest.raises(FoveateError, match="no model 'x'"):
        serve_locally(load, ServerSettings(), Place(port=free_port()))


def test_kept_images_can_be_fetched_while_the_server_ends(start: Callable[..., Live]) -> None:
    live = start()
    path = live.generate(response_format="url").data["data"][0]["url"].removeprefix(live.url)
    live.service.is_closing = True
    assert live.refused(503)["code"] == "closing"
    assert live.send(path).status == 200


def test_a_taken_address_is_refused_before_anything_is_loaded() -> None:
    def load() -> Any:
        raise AssertionError("it must not load")

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(FoveateError, match="try another --port"):
        serve_locally(load, ServerSettings(), Place(port=taken.getsockname()[1]))
    with pytest.raises(FoveateError, match="port must be"):
        Place(port=70_000)
    with pytest.raises(FoveateError, match="grace must be"):
        Place(grace_s=0.0)


@pytest.mark.soak
def test_the_command_under_load(toy_folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "foveate", "serve", "--model", str(toy_folder), "--port", str(port),
               "--grace", "20", "--max-queue", "64"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            eventually(lambda: ask(port)[0] == 200, "it is ready")
            answers: list[tuple[int, Any]] = []
            bodies = [{"prompt": PROMPT, "seed": seed, "n": 2} for seed in range(20)]
            threads = [threading.Thread(target=lambda b=body: answers.append(ask(port, PATH, b))) for body in bodies]
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            _, log = server.communicate(timeout=40)
            seconds = time.monotonic() - began
            for thread in threads:
                thread.join(TIMEOUT_S)
        finally:
            server.kill()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    accepted = sum(line["event"] == "accepted" for line in lines)
    done = sum(line["event"] == "done" for line in lines)
    statuses = [status for status, _ in answers]
    assert server.returncode == 0
    assert seconds < 20
    assert accepted == done == statuses.count(200) > 0, "every accepted request was finished"
    assert set(statuses) <= {200, 503, 0}
    assert not any("error_type" in line for line in lines)
