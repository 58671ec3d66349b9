"""Requests by another name than the server's: a web page whose name points at this machine reads nothing."""

from collections.abc import Callable

import pytest
from starlette.datastructures import Headers

from foveate.core.errors import FoveateError
from foveate.server.errors import ApiError
from foveate.server.hosts import LOOPBACK, check_host
from foveate.server.settings import ServerSettings
from tests.server.conftest import Live


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_pass(host: str) -> None:
    check_host(Headers({"host": host}), LOOPBACK)


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"], ["evil.example:8000"], ["localhost.evil.example"], ["evil.example:localhost"], [""], [],
        ["localhost", "evil.example"], ["[::1].evil.example"[1:]], ["127.0.0.1@evil.example"],
    ],
)  # fmt: skip
def test_other_names_are_refused(hosts: list[str]) -> None:
    headers = Headers(raw=[(b"host", host.encode()) for host in hosts])
    with pytest.raises(ApiError, match="--allowed-host"):
        check_host(headers, LOOPBACK)
    check_host(headers, None)


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("foo.test:8080", "foo.test"), ("FOO.test", "foo.test:1"), ("[::1]", "[::1]:8000"),
        ("[fe80::A]:80", "[FE80::a]"), ("::1", "[::1]"), ("2001:db8::7", "[2001:db8::7]:8000"),
        ("192.168.0.7:80", "192.168.0.7"),
    ],
)  # fmt: skip
def test_a_name_is_allowed_with_any_port(given: str, host: str) -> None:
    hosts = ServerSettings(hosts=(given,)).hosts
    check_host(Headers({"host": host}), hosts)
    with pytest.raises(ApiError):
        check_host(Headers({"host": "other.test"}), hosts)


@pytest.mark.parametrize(
    "given", ["", "https://foo.test", "foo.test/", "*.foo.test", "a.test,b.test", "[::1", "a:b", "\u00f6.test"]
)
def test_a_name_that_no_header_has_is_refused(given: str) -> None:
    with pytest.raises(FoveateError, match="--allowed-host must be a name"):
        ServerSettings(hosts=(given,))


def test_a_page_of_another_name_gets_nothing(start: Callable[..., Live]) -> None:
    live = start(hosts=(*LOOPBACK, "images.example"))
    for path in ("/", "/v1/models", "/metrics", "/health"):
        assert live.send(path).status == 200
        assert live.send(path, headers={"Host": "IMAGES.example"}).status == 200
        answer = live.send(path, headers={"Host": f"evil.example:{live.port}"})
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
    assert live.send(body={"prompt": "a cat"}, headers={"Host": "evil.example"}).status == 403
