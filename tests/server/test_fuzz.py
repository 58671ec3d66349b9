"""Schemathesis, by the server's own description: whatever is sent, no 5xx, and answers are as described."""

from collections.abc import Callable

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from foveate.server.limits import Limits
from tests.server.conftest import Live

_CHECKS = [not_a_server_error, content_type_conformance, status_code_conformance]


def fuzz(live: Live, examples: int, without: str | None = None) -> int:
    """Sends generated requests to every operation, but for a path; returns how many."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    schema = schema if without is None else schema.exclude(path=without)
    run = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    sent = 0

    def send(case: schemathesis.Case) -> None:
        nonlocal sent
        sent += 1
        case.call_and_validate(checks=_CHECKS, timeout=60)

    for result in schema.get_all_operations():
        run(given(case=result.ok().as_strategy())(send))()
    return sent


@pytest.fixture
def small(start: Callable[..., Live]) -> Live:
    """A server whose images are small and single."""
    return start(limits=Limits(images=1, pixels=256 * 256))


def test_a_few_requests(small: Live) -> None:
    assert fuzz(small, 1, without="/v1/images/compare") >= 10


@pytest.mark.soak
def test_many_requests(small: Live) -> None:
    assert fuzz(small, 100) >= 500
