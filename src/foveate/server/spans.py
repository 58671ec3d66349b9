"""OpenTelemetry spans of requests, where an SDK is configured; otherwise nothing is made and nothing is sent.

A request is one span from its acceptance to its end, with the scales of its images as events, and the time in the
queue is a span inside it. Only opentelemetry-api is imported; the SDK and its exporter are the operator's choice, for
example `opentelemetry-instrument foveate serve`.
"""

import time
from collections.abc import Mapping
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagate import extract
from opentelemetry.trace import NoOpTracer, ProxyTracer, Span, StatusCode, Tracer

from foveate.core.version import __version__
from foveate.server.metrics import outcome_of
from foveate.server.work import Event, Failed, Finished, ImageDone, Listener, ScaleDone, Started, Work

_TRACER: Final = "foveate"


class Spans:
    """Makes spans with a tracer.

    Args:
        tracer: None takes that of the configured provider.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = trace.get_tracer(_TRACER, __version__) if tracer is None else tracer
        # What the API gives without an SDK; then no listener is wrapped at all.
        self.is_recording = not isinstance(self._tracer, NoOpTracer | ProxyTracer)

    def watch(
        self, request_id: str, work: Work, listener: Listener, headers: Mapping[str, str] | None = None
    ) -> Listener:
        """A listener that writes the spans of a request and hands events on; the same one where nothing is recorded.

        Args:
            request_id: Of the header `x-request-id`.
            work: What is submitted next. Neither its prompt nor its key becomes an attribute.
            listener: What gets the events.
            headers: Of the request in lower case, whose `traceparent` is the caller's span.
        """
        if not self.is_recording:
            return listener
        return _Watch(self._tracer, request_id, work, listener, extract(headers or {}))


class _Watch:
    """The listener of one request; its span begins with the first event, so that a refused request has none."""

    def __init__(self, tracer: Tracer, request_id: str, work: Work, listener: Listener, context: Context) -> None:
        self._tracer, self._work, self._listener, self._context = tracer, work, listener, context
        self._began_ns = time.time_ns()
        self._id = request_id
        self._span: Span | None = None
        self._has_started = self._is_coarse = False

    def __call__(self, event: Event) -> None:
        """Writes what the event says."""
        span = self._opened()
        match event:
            case Started():
                self._leave_queue(span)
            case ScaleDone():
                span.add_event(
                    "scale",
                    {
                        "foveate.image": event.index,
                        "foveate.scale": event.scale,
                        "foveate.grid": event.grid,
                        "foveate.ms": event.ms,
                        "foveate.batch_images": event.company,
                        "foveate.tokens_run": event.tokens_run,
                        "foveate.tokens_full": event.tokens_full,
                    },
                )
            case ImageDone():
                self._is_coarse |= event.is_coarse
                span.add_event("image", {"foveate.image": event.index, "foveate.is_coarse": event.is_coarse})
            case Finished():
                span.set_attribute("foveate.outcome", "coarse" if self._is_coarse else "finished")
                span.end()
            case Failed(error=error):
                self._fail(span, error)
        self._listener(event)

    def _opened(self) -> Span:
        if self._span is None:
            job = self._work.job
            self._span = self._tracer.start_span(
                "foveate.request",
                self._context,
                start_time=self._began_ns,
                attributes={
                    "foveate.request_id": self._id,
                    "foveate.policy": job.policy.spec,
                    "foveate.seeds": job.seeds,
                    "foveate.num_images": job.num_images,
                },
            )
        return self._span

    def _leave_queue(self, span: Span) -> None:
        """Writes the time in the queue, once a request."""
        if not self._has_started:
            inside = trace.set_span_in_context(span, self._context)
            self._tracer.start_span("foveate.queue", inside, start_time=self._began_ns).end()
        self._has_started = True

    def _fail(self, span: Span, error: Exception) -> None:
        """Ends the span; only an error that is nobody's wish is one for the operator."""
        outcome = outcome_of(error)
        span.set_attribute("foveate.outcome", outcome)
        if outcome == "failed":
            span.record_exception(error)
            span.set_status(StatusCode.ERROR, type(error).__name__)
        span.end()
