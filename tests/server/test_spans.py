"""Spans: a request, its time in the queue and its scales, where an SDK is there; nothing otherwise."""

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from foveate.core.errors import Cancelled
from foveate.pipeline.pipeline import Pipeline
from foveate.server.spans import Spans
from foveate.server.work import Failed
from tests.server.observed import PROMPT, events_of, request


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider.get_tracer("test"))


def test_a_request_of_a_caller_with_a_span(spans: Spans, exporter: InMemorySpanExporter, toy_pipe: Pipeline) -> None:
    work = request(toy_pipe)
    events, heard = events_of(toy_pipe, work), list[object]()
    headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    listener = spans.watch("req-1", work, heard.append, headers)
    for event in events:
        listener(event)
    assert heard == events
    queue, whole = exporter.get_finished_spans()
    assert (queue.name, whole.name) == ("foveate.queue", "foveate.request")
    assert whole.parent is not None
    assert (whole.context.trace_id, whole.parent.span_id) == (int("ab" * 16, 16), int("cd" * 8, 16))
    assert queue.parent is not None
    assert queue.parent.span_id == whole.context.span_id
    assert [event.name for event in whole.events] == ["scale"] * len(work.job.schedule) + ["image"]
    assert whole.attributes is not None
    assert whole.attributes["foveate.outcome"] == "finished"
    assert whole.attributes["foveate.request_id"] == "req-1"
    for text in (PROMPT, "sk-secret"):
        assert text not in whole.to_json()


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [(Cancelled(), "cancelled", StatusCode.UNSET), (RuntimeError("boom"), "failed", StatusCode.ERROR)],
)
def test_a_request_without_an_image(
    spans: Spans, exporter: InMemorySpanExporter, toy_pipe: Pipeline, error: Exception, outcome: str, status: StatusCode
) -> None:
    spans.watch("req-2", request(toy_pipe), lambda _: None)(Failed(error=error))
    (whole,) = exporter.get_finished_spans()
    assert whole.attributes is not None
    assert (whole.attributes["foveate.outcome"], whole.status.status_code) == (outcome, status)


def test_a_refused_request_has_no_span(spans: Spans, exporter: InMemorySpanExporter, toy_pipe: Pipeline) -> None:
    spans.watch("req-3", request(toy_pipe), lambda _: None)
    assert not exporter.get_finished_spans()


def test_without_an_sdk_nothing_is_wrapped(toy_pipe: Pipeline) -> None:
    found = Spans()
    assert not found.is_recording
    assert found.watch("req-4", request(toy_pipe), print) is print


@pytest.mark.soak
def test_without_an_sdk_nothing_of_it_is_imported() -> None:
    code = """
import sys
from foveate.server.spans import Spans
spans = Spans()
assert not spans.is_recording
assert spans.watch("id", None, print) is print
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
