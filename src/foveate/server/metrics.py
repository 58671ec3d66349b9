"""What a server counts, for Prometheus: a registry of its own per app, and labels from fixed sets alone.

No label holds what a client wrote: a policy counts under its registered name, a preset under its own, and everything
else under `other`. Gauges are read from the scheduler when somebody scrapes.
"""

import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from foveate.core.composition import Composed
from foveate.core.errors import Cancelled
from foveate.policies.registry import PRESETS, all_policies
from foveate.server.work import (
    ClosingError,
    Event,
    Failed,
    Finished,
    ImageDone,
    LateError,
    Listener,
    ScaleDone,
    Started,
    Stats,
    Work,
)

Reason = Literal[
    "key", "rate", "queue_full", "too_large", "invalid", "memory", "moderation", "moderation_timeout", "closing"
]
"""Why a request was not accepted: a wrong key, too many of one key, a full queue, a body or a count over a limit, a
field that is wrong, more memory than there is, the moderation hook, one that took too long, or a server that stops."""

Outcome = Literal["finished", "coarse", "late", "cancelled", "closing", "failed"]
"""How an accepted request ended; `coarse` had an image that its deadline cut short, `late` was answered by an error."""

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Of `Metrics.render`."""

OTHER, NONE = "other", "none"
"""Policies that are not registered, and requests that were refused before their policy was known."""

_CLOSING = "1 while the server finishes what it accepted and takes no more"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_SCALE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """Counts requests and what they ran; every method may be called from any thread.

    Args:
        stats: `Scheduling.stats` of the scheduler that is watched; None where there is none in this process.
        is_closing: Whether the server takes no more requests; asked where there are no `stats`, which say it too.
    """

    def __init__(self, stats: Callable[[], Stats] | None, is_closing: Callable[[], bool] | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        self._labels = frozenset({*all_policies(), *PRESETS, Composed.name, NONE, OTHER})
        if stats is not None:
            registry.register(_Held(stats))
        elif is_closing is not None:
            registry.register(_Closing(is_closing))
        ProcessCollector(registry=registry)
        self._answers = Counter(
            "foveate_requests", "Answered requests for images, by HTTP status", ("status", "policy"), registry=registry
        )
        self._answer_s = Histogram(
            "foveate_request_seconds", "From the first byte of a request for images to the last one of its answer",
            ("policy",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._refused = Counter("foveate_rejected", "Requests that were not accepted", ("reason",), registry=registry)
        self._ended = Counter(
            "foveate_accepted", "Accepted requests that have ended", ("outcome", "policy"), registry=registry
        )
        self._images = Counter("foveate_images", "Images that were sent", ("policy",), registry=registry)
        self._wait_s = Histogram(
            "foveate_queue_wait_seconds", "From acceptance to the start of a request's first image",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first_s = Histogram(
            "foveate_first_partial_seconds", "From acceptance to the first partial image, where some were asked for",
            ("policy",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._scale_s = Histogram(
            "foveate_scale_seconds", "An image's share of the time of its batch at a scale",
            ("scale",), buckets=_SCALE_SECONDS, registry=registry,
        )  # fmt: skip
        self._company = Histogram(
            "foveate_batch_images", "Images in the batch of a scale, observed once by each of them",
            buckets=_IMAGES, registry=registry,
        )  # fmt: skip
        self._tokens = _saving("foveate_tokens", "Tokens that reached the head, conditional branch", registry)
        self._flops = _saving("foveate_flops", "FLOPs of the transformer", registry)
        self._branches = _saving("foveate_branches", "Branches of finished images, each counted per scale", registry)

    def watch(self, work: Work, listener: Listener) -> Listener:
        """A listener that counts every event of a request and hands it on; made just before the work is submitted."""
        return _Watch(self, work, self.policy(work), listener)

    def policy(self, work: Work) -> str:
        """The label of a request's policy: its preset's name, or its own."""
        asked = work.job.options["policy"]
        return self.known(asked if isinstance(asked, str) and asked in PRESETS else work.job.policy.name)

    def known(self, policy: str | None) -> str:
        """A name as a label: itself if it is one of ours, `none` for None, and `other` for anything else."""
        return NONE if policy is None else policy if policy in self._labels else OTHER

    def rejected(self, reason: Reason) -> None:
        """Counts a request that was not accepted."""
        assert reason in get_args(Reason), f"{reason} would be a label that no dashboard knows"
        self._refused.labels(reason).inc()

    def finished(self, status: int, policy: str | None, seconds: float) -> None:
        """Counts an answer of an endpoint that makes images, an error too.

        Args:
            status: Of HTTP; 499 where the client left early, and that of the error where a stream ended with one.
            policy: A policy or preset by name, or what `Metrics.policy` says; None where it never became known.
            seconds: From the first byte of the request to the last one of the answer.
        """
        label = self.known(policy)
        self._answers.labels(str(status), label).inc()
        self._answer_s.labels(label).observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format, whose content type is `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def _started(self, waited_ms: float) -> None:
        self._wait_s.observe(waited_ms / 1e3)

    def _scale(self, event: ScaleDone, policy: str) -> None:
        self._scale_s.labels(str(event.scale)).observe(event.ms / 1e3)
        self._company.observe(event.company)
        _count(self._tokens, policy, event.tokens_run, event.tokens_full)
        _count(self._flops, policy, event.flops, event.flops_full)

    def _first(self, policy: str, seconds: float) -> None:
        self._first_s.labels(policy).observe(seconds)

    def _image(self, event: ImageDone, work: Work, policy: str) -> None:
        self._images.labels(policy).inc()
        run = sum(len(scale.work.rows) for scale in event.output.trace.scales if scale.ran)
        needs = work.job.guidance.is_needed
        _count(self._branches, policy, run, sum(1 + needs(scale) for scale in range(event.scales)))

    def _end(self, outcome: Outcome, policy: str) -> None:
        self._ended.labels(outcome, policy).inc()


class _Watch:
    """The listener of one request; events of one request come one after the other."""

    def __init__(self, metrics: Metrics, work: Work, policy: str, listener: Listener) -> None:
        self._metrics, self._work, self._policy, self._listener = metrics, work, policy, listener
        self._began = time.monotonic()
        self._has_started = self._is_coarse = False
        self._wants_first = work.partials > 0 or work.every_scale

    def __call__(self, event: Event) -> None:
        self._count(event)
        self._listener(event)

    def _count(self, event: Event) -> None:
        match event:
            case Started():
                if not self._has_started:
                    self._metrics._started(event.waited_ms)
                self._has_started = True
            case ScaleDone():
                self._metrics._scale(event, self._policy)
                self._seen(event.image is not None)
            case ImageDone():
                self._is_coarse |= event.is_coarse
                self._metrics._image(event, self._work, self._policy)
                self._seen(is_image=True)
            case Finished():
                self._metrics._end("coarse" if self._is_coarse else "finished", self._policy)
            case Failed(error=error):
                self._metrics._end(outcome_of(error), self._policy)

    def _seen(self, is_image: bool) -> None:
        """Observes the first image of a request that asked for partial ones."""
        if self._wants_first and is_image:
            self._wants_first = False
            self._metrics._first(self._policy, time.monotonic() - self._began)


class _Closing(Collector):
    """Whether a server without a scheduler of its own stops."""

    def __init__(self, is_closing: Callable[[], bool]) -> None:
        self._is_closing = is_closing

    def collect(self) -> Iterator[Metric]:
        """One sample."""
        yield GaugeMetricFamily("foveate_closing", _CLOSING, value=int(self._is_closing()))


class _Held(Collector):
    """What the scheduler holds, read when somebody scrapes."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        stats = self._stats()
        gauges = {
            "queue_requests": ("Requests that wait", stats.queued_requests),
            "queue_images": ("Images that wait", stats.queued_images),
            "running_images": ("Images in progress", stats.running_images),
            "max_images": ("Images that may be in progress at once", stats.max_images),
            "memory_reserved_bytes": ("Memory of admitted images, by the memory model", stats.reserved_bytes),
            "memory_budget_bytes": ("Memory that images may take, by the memory model", stats.budget_bytes),
            "images_per_second": ("Running mean over the latest images", stats.images_per_s),
            "closing": (_CLOSING, int(stats.is_closing)),
        }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"foveate_{name}", text, value=value)
        yield CounterMetricFamily("foveate_restarts", "Errors that escaped the scheduler's loop", value=stats.restarts)


def outcome_of(error: Exception) -> Outcome:
    """How a request ended that has no more images."""
    kinds: dict[type[Exception], Outcome] = {Cancelled: "cancelled", LateError: "late", ClosingError: "closing"}
    return next((outcome for kind, outcome in kinds.items() if isinstance(error, kind)), "failed")


def _saving(name: str, text: str, registry: CollectorRegistry) -> Counter:
    """A counter of what ran and of what was left out; both together are the full run."""
    return Counter(name, f"{text}: run, and saved against the full run", ("part", "policy"), registry=registry)


def _count(counter: Counter, policy: str, run: float | int, full: float | int) -> None:
    """Adds what ran, and what the full run had more; a policy may also add work, which is no negative saving."""
    counter.labels("run", policy).inc(run)
    counter.labels("saved", policy).inc(max(full - run, 0))
