"""A real nginx with the example's configuration in front of a real server: events come when they are sent.

The server's header X-Accel-Buffering is ignored, and nginx asks it in HTTP/1.0, as chunks would be handed on even where
it buffers. So the configuration alone has to let events through.
"""

import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.server.work import Work
from tests.server.conftest import PATH, TIMEOUT_S, eventually
from tests.server.test_deploy import DEPLOY
from tests.server.test_metrics import value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def proxied(start: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[Any, http.client.HTTPConnection]]:
    """A server, and a connection to an nginx in front of it; without TLS, as that needs a certificate."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("nginx is missing: apt-get install nginx-light")
    server, port = start(), free_port()
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    changes = {
        "server 127.0.0.1:8000": f"server 127.0.0.1:{server.port}",
        "proxy_http_version 1.1;": "proxy_http_version 1.0;",
        "listen 80;": f"listen 127.0.0.1:{free_port()};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{port};",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    lines = [line for line in text.splitlines() if not line.strip().startswith("ssl_")]
    (tmp_path / "foveate.conf").write_text("\n".join(lines), encoding="utf-8")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    no_help = "proxy_ignore_headers X-Accel-Buffering;"
    folders = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    http_block = f"http {{ access_log off; {folders} {no_help} include foveate.conf; }}"
    main = f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} {http_block}"
    (tmp_path / "nginx.conf").write_text(main, encoding="utf-8")
    command = [program, "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        eventually(lambda: is_open(port), "nginx listens")
        yield server, connection
    finally:
        connection.close()
        process.terminate()
        process.wait()


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.soak
def test_an_event_of_few_bytes_is_here_while_the_request_waits(
    proxied: tuple[Any, http.client.HTTPConnection],
) -> None:
    server, connection = proxied
    held = threading.Event()
    work = Work(job=server.scheduler.pipe.job("a red cat", {"seed": 1}))
    server.scheduler.submit(work, lambda _: held.wait(2 * TIMEOUT_S))
    body = json.dumps({"prompt": "a red cat", "stream": True, "trace": True, "seed": 1})
    try:
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline() == b"event: foveate.accepted\r\n"
    finally:
        held.set()
    assert response.read().count(b"event: image_generation.completed") == 1


@pytest.mark.soak
def test_every_event_is_here_before_the_image_is_made(
    proxied: tuple[Any, http.client.HTTPConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, connection = proxied
    has_come, pipe = threading.Event(), server.scheduler.pipe
    finish = type(pipe).finish

    def held(self: Any, call: Any, step: Any) -> Any:
        assert has_come.wait(TIMEOUT_S), "the image is made only when the client has all events of scales"
        return finish(self, call, step)

    monkeypatch.setattr(type(pipe), "finish", held)
    body = json.dumps({"prompt": "a red cat", "stream": True, "trace": True, "seed": 1})
    try:
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        # The last scale's event comes with the image.
        for scale in range(len(pipe.job("a red cat", {}).schedule) - 1):
            while not (line := response.readline()).startswith(b'data: {"type":"foveate.scale"'):
                assert line, "the stream goes on"
            assert json.loads(line[6:])["scale"] == scale
    finally:
        has_come.set()
    assert response.read().count(b"event: image_generation.completed") == 1


@pytest.mark.soak
def test_a_client_that_goes_away_stops_its_work(proxied: tuple[Any, http.client.HTTPConnection]) -> None:
    server, connection = proxied
    body = json.dumps({"prompt": "a red cat", "stream": True, "partial_images": 3, "n": 8, "seed": 1})
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    connection.getresponse().readline()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    metrics = server.service.metrics
    cancelled = {"outcome": "cancelled", "policy": "full"}
    eventually(lambda: value(metrics, "foveate_accepted_total", **cancelled) == 1, "the request is cancelled")


@pytest.mark.soak
def test_metrics_are_for_the_inside(proxied: tuple[Any, http.client.HTTPConnection]) -> None:
    _, connection = proxied
    for path, status in (("/metrics", 404), ("/health", 200)):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == status
