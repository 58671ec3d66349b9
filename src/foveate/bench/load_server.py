"""The server under load: one that this process starts on loopback and ends, and what a server says of itself."""

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx2

from foveate.core.errors import FoveateError

_EVERY_S = 1.0
"""Between two looks at a server's metrics."""

_LOAD_S, _POLL_S, _STOP_S = 600.0, 0.2, 30.0
_OK, _SAID = 200, 400

_NAMES = {
    "foveate_queue_images": "queue_images",
    "foveate_running_images": "running_images",
    "foveate_restarts_total": "restarts",
    "process_resident_memory_bytes": "resident_bytes",
    "process_open_fds": "open_files",
    "process_cpu_seconds_total": "cpu_s",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What a server's `/metrics` said at one moment; None is what it did not say."""

    at_s: float
    queue_images: float | None = None
    running_images: float | None = None
    restarts: float | None = None
    resident_bytes: float | None = None
    open_files: float | None = None
    cpu_s: float | None = None


def parsed(text: str, at_s: float) -> Sample:
    """The sample in a page of Prometheus' text format; numbers of several replicas are added up."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = _NAMES.get(line.partition(" ")[0].partition("{")[0])
        if name is not None:
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return Sample(at_s=at_s, **found)


async def sampled(client: httpx2.AsyncClient, now: Callable[[], float]) -> Sequence[Sample]:
    """Looks at a server's metrics again and again, until it is cancelled; then says what it saw."""
    found: list[Sample] = []
    try:
        while True:
            try:
                response = await client.get("/metrics")
            except httpx2.HTTPError:
                response = None
            if response is not None and response.status_code == _OK:
                found.append(parsed(response.text, now()))
            await asyncio.sleep(_EVERY_S)
    except asyncio.CancelledError:
        return found


def told(url: str, path: str) -> dict[str, Any]:
    """What a server says at a path as JSON; empty where it says nothing."""
    try:
        response = httpx2.get(f"{url}{path}", timeout=10)
        content = response.json() if response.status_code == _OK else {}
    except (httpx2.HTTPError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A server that this process started."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def started(flags: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Started]:
    """Starts `foveate serve` on a free port of loopback, waits until it is ready, and ends it behind the block.

    Args:
        flags: Of `foveate serve`, beside the port.
        environment: Of the process; None is this one's.

    Raises:
        FoveateError: It ends, or is not ready in ten minutes; the last lines that it wrote are said.
    """
    port = _free_port()
    command = [sys.executable, "-m", "foveate", "serve", "--host", "127.0.0.1", "--port", str(port), *flags]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, log)
            yield Started(url=url, process=process)
        finally:
            _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    until = time.monotonic() + _LOAD_S
    while not is_ready(url):
        code = process.poll()
        if code is not None:
            raise FoveateError(f"the server ended with code {code} before it was ready: {_tail(log)}")
        if time.monotonic() > until:
            raise FoveateError(f"the server was not ready after {_LOAD_S:.0f} s: {_tail(log)}")
        time.sleep(_POLL_S)


def is_ready(url: str) -> bool:
    """Whether a server takes requests; one without `/ready` is asked for its models."""
    try:
        response = httpx2.get(f"{url}/ready", timeout=10)
    except httpx2.HTTPError:
        return False
    return response.status_code in (_OK, httpx2.codes.NOT_FOUND)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-_SAID:].strip() or "it wrote nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and what is accepted is finished; SIGKILL if that takes too long."""
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
