"""What clients do wrong, and what goes away: nothing hangs, nothing crashes, and every answer is in the envelope."""

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from foveate.server.keys import LOCAL
from foveate.server.limits import Limits
from tests.server.conftest import PATH, PROMPT, Live, eventually
from tests.server.test_metrics import value

JSON = "Content-Type: application/json\r\n"


def request(body: bytes, headers: str = JSON, *, length: int | None = None) -> bytes:
    """The bytes of a request for an image."""
    size = len(body) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def envelope(answer: bytes) -> dict[str, Any]:
    """The error of raw bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer
    return json.loads(body)["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"1", b"{}", b'{"prompt": NaN}', b'{"prompt": "a", "seed": Infinity}',
        b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": ["a"]}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"\x00" * 100, b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "guidance_scale": [' + b"1," * 50_000 + b"1]}", b'{"prompt": {"a": 1}}',
        b'{"prompt": "a", "n": 1e3}', b'{"prompt": "a", "n": null, "size": 256}',
    ],
)  # fmt: skip
def test_bodies_that_are_none_are_refused(live: Live, body: bytes) -> None:
    answer = live.send(PATH, body)
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.body) < 2000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guidance_scale": [""] * 200_000}, "valid number"),
        ({"guidance_scale": [1.0] * 65}, ""),
        ({"top_k": [""] * 200_000}, "valid integer"),
        ({str(name): 1 for name in range(60_000)}, "64 fields or less, got 60001"),
    ],
)
def test_a_body_with_many_errors_holds_nobody_up(live: Live, body: dict[str, Any], message: str) -> None:
    began = time.process_time()
    answer = live.send(PATH, {"prompt": PROMPT, **body})
    assert (answer.status, message in answer.error["message"]) == (400, True)
    assert time.process_time() - began < 3


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_json_has_not_are_no_json(live: Live, number: bytes) -> None:
    answer = live.send(PATH, b'{"prompt": "a", "guidance_scale": ' + number + b"}")
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a/b/c"]
)
def test_other_types_of_bodies_are_refused(live: Live, kind: str | None) -> None:
    headers = "" if kind is None else f"Content-Type: {kind}\r\n"
    error = envelope(live.raw(request(b'{"prompt": "a"}', headers)))
    assert error["type"] == "invalid_request_error"


def test_huge_bodies_are_cut_off(start: Callable[..., Live]) -> None:
    live = start(limits=Limits(body_bytes=1000))
    error = envelope(live.raw(request(b"x", length=10**12)))
    assert error["code"] == "request_too_large"
    chunks = b"".join(b"100\r\n" + b"x" * 256 + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\n{JSON}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert envelope(live.raw(head.encode() + chunks))["code"] == "request_too_large"
    fits = json.dumps({"prompt": ""}).encode()
    assert envelope(live.raw(request(fits)))["param"] == "prompt"


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nA b: c\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\n\nGET /b HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    ],
)  # fmt: skip
def test_what_two_servers_could_read_differently_is_no_http(live: Live, head: bytes) -> None:
    """Smuggled headers: each of these is one refusal and a closed connection, never two requests."""
    answer = live.raw(head)
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert envelope(answer)["code"] in ("invalid_http", "invalid_request")


def test_long_headers_are_cut_off(live: Live) -> None:
    answer = live.raw(b"GET /health HTTP/1.1\r\n" + b"A: " + b"x" * 70_000)
    assert envelope(answer)["code"] == "headers_too_large"
    assert answer.startswith(b"HTTP/1.1 431 ")


def drips(live: Live) -> float:
    """Seconds until the server hangs up on a client that sends a byte now and then."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as slow:
        try:
            for _ in range(100):
                slow.sendall(b"A")
                time.sleep(0.05)
        except OSError:
            pass
    return time.monotonic() - began


def test_slow_headers_and_bodies_are_cut_off(start: Callable[..., Live]) -> None:
    live = start(limits=Limits(header_seconds=0.3, body_seconds=0.3))
    began = time.monotonic()
    assert envelope(live.raw(b"GET /health HTTP/1.1\r\nHost: a\r\n"))["code"] == "request_timeout"
    assert live.raw(b"") != b"", "a connection that sends nothing is told, too"
    assert envelope(live.raw(request(b'{"prompt"', length=100)))["code"] == "request_timeout"
    # A drop now and then does not help.
    assert drips(live) < 2
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as kept:
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            found = b""
            while b"alive" not in found:
                found += kept.recv(65536)
        # The second request of a connection has no more time than the first.
        kept.sendall(b"GET /health HTTP/1.1\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 20
    assert live.generate().status == 200


def test_a_client_that_reads_nothing_is_hung_up_on(start: Callable[..., Live]) -> None:
    live = start(limits=Limits(send_seconds=0.3), send_buffer=4096)
    body = json.dumps({"prompt": PROMPT, "n": 2}).encode()
    with socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.settimeout(30)
        idle.connect(("127.0.0.1", live.port))
        idle.sendall(request(body))
        eventually(lambda: 'foveate_requests_total{policy="full",status="200"}' in live.send("/metrics").body.decode(),
                   "it is answered")  # fmt: skip
        time.sleep(0.7)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := idle.recv(65536):
                found += part
    head = found.decode().lower()
    length = int(head.partition("content-length: ")[2].split()[0])
    assert len(found) < length / 2, "the rest was dropped"


def test_too_many_connections_are_refused(start: Callable[..., Live]) -> None:
    live = start(limits=Limits(connections=2))
    held = [socket.create_connection(("127.0.0.1", live.port), timeout=10) for _ in range(2)]
    try:
        time.sleep(0.1)
        assert envelope(live.raw(b""))["code"] == "overloaded"
    finally:
        for connection in held:
            connection.close()
    eventually(lambda: live.send("/health").status == 200, "there is room again")


def vanish(live: Live, body: dict[str, Any], headers: str = "", *, until: bytes | None = None) -> bytes:
    """Sends a request and goes away, at once or when something has come."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        connection.sendall(request(content, f"{JSON}{headers}"))
        found = b""
        if until is None:
            eventually(lambda: live.scheduler.stats().running_images > 0, "it runs")
        while until is not None and until not in found:
            found += connection.recv(65536)
        return found


@pytest.mark.parametrize("body", [{"n": 4}, {"n": 4, "stream": True, "trace": True}])
def test_a_client_that_goes_away_stops_its_work(live: Live, body: dict[str, Any]) -> None:
    until = b"foveate.scale" if body.get("stream") else None
    refused = value(live.service.metrics, "foveate_rejected_total", reason="invalid")
    vanish(live, {"prompt": PROMPT, "size": "512x512", **body}, until=until)
    stats = live.scheduler.stats
    eventually(lambda: stats().running_images == stats().queued_images == 0, "it is stopped")
    assert stats().reserved_bytes == 0
    metrics = live.service.metrics
    cancelled = functools.partial(value, metrics, "foveate_accepted_total", outcome="cancelled", policy="full")
    eventually(lambda: (cancelled() or 0) >= 1, "it is counted as cancelled")
    eventually(lambda: 'status="499"' in metrics.render().decode(), "its client is known to have left")
    assert value(live.service.metrics, "foveate_rejected_total", reason="invalid") == refused


def test_what_a_client_left_is_finished_into_the_store(start: Callable[..., Live]) -> None:
    live = start(keeps_on_disconnect=True)
    own = "0b8f6c3e-9d1a-4a57-8f5e-2f6d1c7b9a10"
    vanish(live, {"prompt": PROMPT, "seed": 7, "n": 2}, f"X-Request-ID: {own}\r\n")
    eventually(lambda: live.service.store.held[0] == 2, "both are kept")
    (first, kind), (second, _) = (live.service.store.get(LOCAL, name) for name in (own, f"{own}-1"))
    assert (kind, first != second) == ("image/png", True)
    assert live.send(f"/v1/images/{own}").body == first
    found = vanish(live, {"prompt": PROMPT, "seed": 7, "stream": True, "trace": True}, until=b"foveate.scale")
    name = next(line for line in found.decode().split("\r\n") if line.startswith("x-request-id: ")).partition(": ")[2]
    eventually(lambda: live.send(f"/v1/images/{name}").status == 200, "it is kept under the id of the answer")
    assert live.send(f"/v1/images/{name}").body == first


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_left_while_it_was_encoded_is_kept(start: Callable[..., Live], stream: bool) -> None:
    encodes, has_left = threading.Event(), threading.Event()

    def check(_prompt: str, image: Any) -> None:
        if image is not None:
            encodes.set()
            has_left.wait(30)

    live = start(keeps_on_disconnect=True, moderation=check)
    body = json.dumps({"prompt": PROMPT, "seed": 7, "stream": stream}).encode()
    own = "0b8f6c3e-9d1a-4a57-8f5e-2f6d1c7b9a10"
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as connection:
        connection.sendall(request(body, f"{JSON}X-Request-ID: {own}\r\n"))
        assert encodes.wait(30)
    gone = functools.partial(value, live.service.metrics, "foveate_requests_total", policy="full")
    eventually(lambda: gone(status="499") == 1, "it is counted")
    has_left.set()
    eventually(lambda: live.send(f"/v1/images/{own}").status == 200, "it is kept")
    assert live.generate(stream=stream).status == 200
    eventually(lambda: gone(status="200") == 1, "what was answered is counted")
    assert live.service.store.held[0] == 1, "and not kept"


def test_what_was_refused_is_not_kept(start: Callable[..., Live]) -> None:
    refused: list[str] = []

    def check(prompt: str, image: Any) -> str | None:
        if image is None or refused:
            return None
        refused.append(prompt)
        return "not this one"

    live = start(keeps_on_disconnect=True, moderation=check)
    events = live.generate(n=2, size="512x512", stream=True, trace=True).events
    assert events[-1]["error"]["code"] == "moderation_blocked"
    ended = functools.partial(value, live.service.metrics, "foveate_accepted_total", policy="full")
    eventually(lambda: ended(outcome="cancelled") == 1 or ended(outcome="finished") == 1, "it has ended")
    assert ended(outcome="finished") is None
    assert live.service.store.held == (0, 0)


def test_ids_of_clients_are_uuids_or_ours(live: Live) -> None:
    own = "0b8f6c3e-9d1a-4a57-8f5e-2f6d1c7b9a10"
    assert live.send("/health", headers={"X-Request-ID": own}).headers["x-request-id"] == own
    for other in ("guess-me", "a" * 36, f"{own}x"):
        assert live.send("/health", headers={"X-Request-ID": other}).headers["x-request-id"] != other


def test_a_full_queue_says_when_to_come_again(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=30) as crowd:
        crowd.sendall(request(json.dumps({"prompt": PROMPT, "n": 8, "size": "512x512"}).encode()))
        eventually(lambda: live.scheduler.stats().queued_images > 0, "they wait")
        answer = live.generate(n=8)
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    eventually(lambda: live.scheduler.stats().running_images == 0, "it is stopped")


def test_an_error_inside_the_model_tells_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    real = live.scheduler.pipe.runner.encode

    def broken(job: Any) -> Any:
        if "secret" in job.prompts[0]:
            raise RuntimeError("/private/path of weights")
        return real(job)

    monkeypatch.setattr(type(live.scheduler.pipe.runner), "encode", lambda _self, job: broken(job))
    error = live.refused(500, prompt="a secret")
    assert (error["message"], error["code"]) == ("the server failed; its log says why", "internal_error")
    assert live.generate().status == 200
