"""API keys: who gets in, what is read again, and that no key is held or logged."""

import hmac
import logging
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.server.keys import Keys
from foveate.server.limits import Limits, RateLimiter
from tests.server.conftest import PATH, PROMPT, Live, eventually

ONE, OTHER, THIRD = "sk-first-key-000000", "sk-second-key-00000", "sk-third-key-000000"


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of people\n{ONE}\n\n  {OTHER}  \n", encoding="utf-8")
    keys = Keys(file, f" {THIRD} ,")
    owners = [keys.owner(key) for key in (ONE, OTHER, THIRD)]
    assert len(set(owners)) == 3
    assert None not in owners
    for wrong in ("", ONE[:-1], f"{ONE} ", f"{ONE}x", "# of people", ONE.upper(), "\udcff", "é" * 20):
        assert keys.owner(wrong) is None
    assert not any(key in f"{vars(keys)}{owners}" for key in (ONE, OTHER, THIRD))


def test_without_keys_everybody_may_come() -> None:
    assert not Keys().is_required
    assert Keys(environment=ONE).is_required


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "short\n", "with a blank in it 0000\n", "schlüssel-0000000000\n"]
)
def test_a_file_without_a_good_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(FoveateError) as refused:
        Keys(file)
    assert content.strip() == "" or content.strip() not in str(refused.value)
    with pytest.raises(FoveateError, match="cannot read the API keys"):
        Keys(tmp_path / "none")


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(f"{ONE}\n", encoding="utf-8")
    keys = Keys(file, clock=clock)
    file.write_text(f"{OTHER}\n{THIRD}\n", encoding="utf-8")
    assert keys.owner(ONE) is not None, "it looks once a second"
    clock.now += 2
    with caplog.at_level(logging.WARNING, "foveate.server"):
        assert (keys.owner(ONE), keys.owner(OTHER) is not None) == (None, True)
        file.unlink()
        clock.now += 2
        assert keys.owner(OTHER) is not None, "what cannot be read changes nothing"
        file.write_text("", encoding="utf-8")
        clock.now += 2
        assert keys.owner(OTHER) is None, "an empty file lets nobody in"
        assert keys.is_required
        file.write_text("short\n", encoding="utf-8")
        clock.now += 2
        assert keys.owner("short") is None
    assert len(caplog.records) == 4
    assert not any(key in caplog.text for key in (ONE, OTHER, THIRD, "short\n"))


def test_every_comparison_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(environment=f"{ONE},{OTHER},{THIRD}")
    made: list[bytes] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        made.append(a)
        return real(a, b)

    monkeypatch.setattr("foveate.server.keys.hmac.compare_digest", compare)
    for key in (ONE, THIRD, "wrong"):
        made.clear()
        keys.owner(key)
        assert len(made) == 3


def test_nobody_without_a_key_gets_in(start: Callable[..., Live]) -> None:
    live = start(keys=Keys(environment=f"{ONE},{OTHER}"))
    wrong = (ONE, f"Basic {ONE}", "Bearer", "Bearer wrong", f"Bearer {ONE}x", f"Bearer {OTHER} {ONE}")
    given = [{}, {"X-Api-Key": ONE}, *({"Authorization": value} for value in wrong)]
    asked = ((PATH, {"prompt": PROMPT}), ("/v1/models", None), ("/v1/images/compare", {}), ("/v1/x", None))
    for headers in given:
        for path, body in asked:
            answer = live.send(path, body, headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert ONE not in answer.body.decode()
    # A key that is not the last of two headers is no key either.
    doubled = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer wrong\r\nAuthorization: Bearer {ONE}\r\n"
    assert b" 401 " in live.raw(f"{doubled}Connection: close\r\n\r\n".encode()).splitlines()[0]
    for path in (
        "//v1/models",
        "/V1/models",
        "/v1/../v1/models",
        "/%761/models",
        "/health/../v1/models",
        "/v1%2fmodels",
    ):
        assert live.send(path).status in (401, 404)
    assert live.send("/v1/models", headers={"Authorization": f"bearer {ONE}"}).status == 200
    for path in ("/health", "/ready", "/version", "/openapi.json", "/metrics"):
        assert live.send(path).status == 200


def test_an_image_belongs_to_its_key(start: Callable[..., Live]) -> None:
    live = start(keys=Keys(environment=f"{ONE},{OTHER}"), headers={"Authorization": f"Bearer {ONE}"})
    url = live.generate(response_format="url").data["data"][0]["url"]
    path = url.removeprefix(live.url)
    assert len(path.removeprefix("/v1/images/")) >= 24
    assert live.send(path).status == 200
    assert live.send(path, headers={"Authorization": f"Bearer {OTHER}"}).status == 404
    for other in ("/v1/images/x", "/v1/images/..%2f..%2fetc%2fpasswd", f"{path}/..", f"/v1/images/{'x' * 99}"):
        assert live.send(other).status in (400, 404)


def test_a_key_is_never_logged(start: Callable[..., Live], caplog: pytest.LogCaptureFixture) -> None:
    def found() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name.startswith("foveate")]

    with caplog.at_level(logging.DEBUG):
        live = start(keys=Keys(environment=ONE), headers={"Authorization": f"Bearer {ONE}"})
        assert live.generate(size="1x1").status == 400
        assert live.send(f"/v1/models?key={ONE}").status == 200
        assert live.send(f"/{ONE}").status == 404
        eventually(lambda: len(found()) >= 3, "all three are logged")
    assert not any(ONE in f"{record.getMessage()}{record.__dict__}" for record in found())


def test_requests_of_a_key_are_spread(start: Callable[..., Live]) -> None:
    live = start(keys=Keys(environment=f"{ONE},{OTHER}"), limits=Limits(requests_per_minute=2.0))
    first, second = ({"Authorization": f"Bearer {key}"} for key in (ONE, OTHER))
    statuses = [live.send(PATH, {"prompt": ""}, headers=first).status for _ in range(3)]
    assert statuses == [400, 400, 429]
    answer = live.send(PATH, {"prompt": ""}, headers=first)
    assert (answer.error["code"], answer.error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert live.send(PATH, {"prompt": ""}, headers=second).status == 400
    assert live.send("/v1/models", headers=first).status == 200


def test_a_bucket_fills_evenly_and_is_forgotten() -> None:
    clock = Clock()
    rate = RateLimiter(60.0, clock)
    assert [rate.wait_s("a") for _ in range(60)] == [0] * 60
    assert rate.wait_s("a") == pytest.approx(1.0)
    clock.now += 1
    assert (rate.wait_s("a"), rate.wait_s("a") > 0) == (0, True)
    clock.now -= 500
    assert rate.wait_s("a") > 0, "a clock that jumps back gives nothing away"
    clock.now += 600
    assert rate.wait_s("b") == 0
    assert len(rate._tokens) == 1
    assert RateLimiter(None).wait_s("a") == 0


def test_limits_that_let_nothing_in_are_refused() -> None:
    with pytest.raises(FoveateError, match="images must be above 0, got 0"):
        Limits(images=0)


def test_the_store_is_readable_to_its_user_alone(live: Live) -> None:
    folder = live.service.store._folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
