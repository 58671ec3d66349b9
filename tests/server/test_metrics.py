"""Metrics: what a request adds to them, and that no label holds what a client wrote."""

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from foveate.core.errors import Cancelled
from foveate.pipeline.pipeline import Pipeline
from foveate.server.metrics import CONTENT_TYPE, Metrics, outcome_of
from foveate.server.work import ClosingError, Event, Failed, LateError
from tests.server.observed import IDLE, events_of, request


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(lambda: IDLE)


def samples(metrics: Metrics) -> list[Sample]:
    """Everything as Prometheus would read it."""
    return [sample for family in text_string_to_metric_families(metrics.render().decode()) for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample; None if there is none."""
    found = [s.value for s in samples(metrics) if s.name == name and s.labels == labels]
    assert len(found) <= 1
    return found[0] if found else None


def test_a_request_is_counted_and_its_events_are_handed_on(metrics: Metrics, toy_pipe: Pipeline) -> None:
    work = request(toy_pipe, policy="drop-branch:count=2")
    events, heard = events_of(toy_pipe, work), list[Event]()
    listener = metrics.watch(work, heard.append)
    for event in events:
        listener(event)
    assert heard == events
    num_scales = len(events) - 3
    policy = {"policy": "drop-branch"}
    assert value(metrics, "foveate_queue_wait_seconds_sum") == 0.25
    assert value(metrics, "foveate_first_partial_seconds_count", **policy) == 1
    assert value(metrics, "foveate_scale_seconds_sum", scale="3") == pytest.approx(0.04)
    assert value(metrics, "foveate_batch_images_sum") == 2 * num_scales
    assert value(metrics, "foveate_flops_total", part="run", **policy) == 60 * num_scales
    assert value(metrics, "foveate_flops_total", part="saved", **policy) == 40 * num_scales
    # The policy stops the unconditional branch for the last two scales.
    assert value(metrics, "foveate_branches_total", part="run", **policy) == 2 * num_scales - 2
    assert value(metrics, "foveate_branches_total", part="saved", **policy) == 2
    tokens = work.job.schedule.num_tokens
    assert value(metrics, "foveate_tokens_total", part="run", **policy) == tokens
    assert value(metrics, "foveate_tokens_total", part="saved", **policy) == 0
    assert value(metrics, "foveate_images_total", **policy) == 1
    assert value(metrics, "foveate_accepted_total", outcome="finished", **policy) == 1


def test_the_first_partial_image_is_timed_only_where_one_was_asked_for(metrics: Metrics, toy_pipe: Pipeline) -> None:
    work = request(toy_pipe, partials=0)
    listener = metrics.watch(work, lambda _: None)
    for event in events_of(toy_pipe, work, is_coarse=True):
        listener(event)
    assert value(metrics, "foveate_first_partial_seconds_count", policy="full") is None
    assert value(metrics, "foveate_accepted_total", outcome="coarse", policy="full") == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Cancelled(), "cancelled"),
        (LateError("late"), "late"),
        (ClosingError("stops"), "closing"),
        (RuntimeError("boom"), "failed"),
    ],
)
def test_how_a_request_without_an_image_ended(
    metrics: Metrics, toy_pipe: Pipeline, error: Exception, outcome: str
) -> None:
    assert outcome_of(error) == outcome
    metrics.watch(request(toy_pipe), lambda _: None)(Failed(error=error))
    assert value(metrics, "foveate_accepted_total", outcome=outcome, policy="full") == 1


def test_labels_come_from_fixed_sets(metrics: Metrics, toy_pipe: Pipeline) -> None:
    preset = request(toy_pipe, policy="preset-draft")
    assert metrics.policy(preset) == "preset-draft"
    assert metrics.policy(request(toy_pipe, policy="fastvar|drop-branch")) == "composed"
    assert metrics.policy(request(toy_pipe, policy="ld-pruning:energy_share=0.8")) == "ld-pruning"
    metrics.finished(400, "a text of a user\n", 0.1)
    metrics.finished(401, None, 0.1)
    assert value(metrics, "foveate_requests_total", status="400", policy="other") == 1
    assert value(metrics, "foveate_requests_total", status="401", policy="none") == 1
    assert "a text" not in metrics.render().decode()


def test_gauges_are_read_at_scrape_time() -> None:
    held = [IDLE]
    metrics = Metrics(lambda: held[-1])
    assert value(metrics, "foveate_queue_images") == 3
    assert value(metrics, "foveate_images_per_second") == 2.5
    assert value(metrics, "foveate_memory_reserved_bytes") == 1_000
    assert value(metrics, "foveate_restarts_total") == 1
    fields = {name: getattr(IDLE, name) for name in IDLE.__slots__}
    held.append(type(IDLE)(**{**fields, "queued_images": 11, "images_per_s": None}))
    assert value(metrics, "foveate_queue_images") == 11
    assert value(metrics, "foveate_images_per_second") is None


def test_every_app_has_a_registry_of_its_own(metrics: Metrics) -> None:
    metrics.rejected("queue_full")
    assert value(metrics, "foveate_rejected_total", reason="queue_full") == 1
    assert value(Metrics(lambda: IDLE), "foveate_rejected_total", reason="queue_full") is None
    assert CONTENT_TYPE.startswith("text/plain")
