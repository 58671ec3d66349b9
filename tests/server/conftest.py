"""The server as clients meet it: real uvicorn on loopback, in a thread, over a real scheduler on the toy."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from foveate.pipeline.pipeline import Pipeline
from foveate.server.app import create_app
from foveate.server.scheduler import Scheduler, SchedulerSettings
from foveate.server.service import Service
from foveate.server.serving import server_of
from foveate.server.settings import ServerSettings

TIMEOUT_S = 30.0
PATH = "/v1/images/generations"
PROMPT = "a red cat"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        """Its JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What the envelope holds, and nothing beside it."""
        assert self.status >= 400, self.body
        assert list(self.data) == ["error"], self.data
        error = self.data["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert "Traceback" not in error["message"]
        return error

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream; every event has the name that its JSON says."""
        assert self.status == 200, self.body
        found = []
        for block in self.body.decode().replace("\r\n", "\n").split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
            if lines:
                found.append(json.loads(lines["data"]))
                assert found[-1]["type"] == lines["event"]
        return found


@dataclass(kw_only=True)
class Live:
    """A running server."""

    port: int
    service: Service
    scheduler: Scheduler
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, path: str = PATH, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Sends a request and reads the whole answer; a body that is not bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {**({} if content is None else {"Content-Type": "application/json"}), **self.headers, **(headers or {})}
        try:
            connection.request(method or ("GET" if content is None else "POST"), path, content, given)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(status=response.status, headers=found, body=response.read())
        finally:
            connection.close()

    def generate(self, **fields: Any) -> Answer:
        """Asks for an image of the toy."""
        return self.send(PATH, {"prompt": PROMPT, "seed": 7, **fields})

    def refused(self, status: int = 400, **fields: Any) -> dict[str, Any]:
        """The error of a request that is refused."""
        answer = self.generate(**fields)
        assert answer.status == status, answer.body
        return answer.error

    def raw(self, content: bytes, *, until_closed: bool = True) -> bytes:
        """Sends bytes and reads until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S) as connection:
            connection.sendall(content)
            found = b""
            while until_closed and (part := connection.recv(65536)):
                found += part
            return found


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Waits until something holds."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def scheduler(toy_pipe: Pipeline) -> Iterator[Scheduler]:
    """One scheduler for all servers of a module; nothing of it is left at the end."""
    found = Scheduler(toy_pipe, SchedulerSettings(max_images=4, max_queue=8))
    found.start()
    yield found
    assert found.close(TIMEOUT_S)
    assert found.stats().reserved_bytes == 0


@pytest.fixture(scope="module")
def start(scheduler: Scheduler, toy_pipe: Pipeline) -> Iterator[Callable[..., Live]]:
    """Starts servers and ends them."""
    running: list[tuple[Any, threading.Thread]] = []

    def make(
        *,
        is_loaded: bool = True,
        headers: dict[str, str] | None = None,
        send_buffer: int | None = None,
        **settings: Any,
    ) -> Live:
        given = ServerSettings(**settings)
        app = create_app(toy_pipe if is_loaded else None, scheduler if is_loaded else None, given)
        server = server_of(app, given.limits)
        listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        running.append((server, thread))
        eventually(lambda: server.started, "the server has started")
        port = listener.getsockname()[1]
        return Live(port=port, service=app.state.service, scheduler=scheduler, headers=headers or {})

    yield make
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live(start: Callable[..., Live]) -> Live:
    """A server as it is by default."""
    return start()
