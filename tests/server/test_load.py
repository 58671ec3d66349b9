"""`foveate bench serve` on a real server: what it counts is what the server counted."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from foveate.bench.load import Calls
from foveate.bench.load_report import summary
from foveate.bench.serve import LoadPlan, run_load
from tests.server.test_metrics import value


@pytest.fixture
def server(start: Callable[..., Any]) -> Iterator[Any]:
    return start()


def plan(**changes: Any) -> LoadPlan:
    settings = {
        "calls": Calls(prompts=("a red cat", "two dogs"), policies=("full", "drop-branch:count=1"), partials=2),
        "concurrency": (), "rate": None, "load": None, "seconds": 30.0, "count": 4, "runs": 1, "warmup": 1,
        "goal_ms": None, "timeout_s": 30.0, "command": "foveate bench serve",
    }  # fmt: skip
    return LoadPlan(**{**settings, **changes})


def test_a_closed_loop(server: Any) -> None:
    report = run_load(server.url, None, plan(concurrency=(2,)))
    ((run,),) = report.sides
    found = summary(run, None)
    assert (found["requests"]["completed"], found["requests"]["failed"]) == (4, 0)
    for shot in run.shots:
        assert shot.first_s is not None
        assert shot.due_s <= shot.sent_s < shot.first_s < shot.done_s
    metrics = server.service.metrics
    # Four, and one of each policy in front of them.
    assert [value(metrics, "foveate_images_total", policy=name) for name in ("full", "drop-branch")] == [3, 3]
    assert value(metrics, "foveate_first_partial_seconds_count", policy="full") == 3
    assert report.facts["server"]["ready"]["model"] == "toy"
    assert run.samples[0].running_images is not None


@pytest.mark.soak
def test_an_open_loop_beyond_capacity_is_refused_and_nothing_is_lost(server: Any) -> None:
    report = run_load(server.url, None, plan(rate=500.0, count=16, seconds=5.0))
    requests = summary(report.sides[0][0], None)["requests"]
    assert requests["refused"] > 0
    assert requests["completed"] >= server.scheduler.settings.max_queue
    assert requests["completed"] + requests["refused"] == requests["due"] == 16
    assert value(server.service.metrics, "foveate_rejected_total", reason="queue_full") == requests["refused"]
    assert server.scheduler.stats().queued_images == server.scheduler.stats().running_images == 0
