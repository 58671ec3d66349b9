"""Log lines of a server as JSON on stderr: request ids, durations, seeds, policy and status.

A prompt is logged only if that was asked for; a key never: no line takes one, and what looks like one is masked in the
text of other libraries as well.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from foveate.server.metrics import outcome_of
from foveate.server.work import Event, Failed, Finished, ImageDone, Listener, ScaleDone, Started, Work

logger = logging.getLogger("foveate.server")

_LEVELLED = ("foveate", "uvicorn", "ray")
"""Loggers whose level is set; give uvicorn `log_config=None` and `access_log=False`, whose lines repeat addresses."""

_PROBES = ("/health", "/ready", "/metrics")

_KEYS = re.compile(r"(?i)\b(bearer\s+|(?:x-)?api[-_]key['\"]?\s*[:=]\s*['\"]?)[^\s'\",;]+")


class JsonLines(logging.Formatter):
    """One JSON object a record: `time` (UTC), `level`, `event`, and the fields that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; an exception adds its type, and its trace for the operator."""
        given = {"request_id": record.request_id} if hasattr(record, "request_id") else {}
        fields: Mapping[str, Any] = getattr(record, "fields", given)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **({} if record.name == logger.name else {"logger": record.name}),
            **fields,
        }
        if record.exc_info is not None and record.exc_info[0] is not None:
            line |= {"error_type": record.exc_info[0].__name__, "trace": self.formatException(record.exc_info)}
        return _KEYS.sub(r"\1***", json.dumps(line, ensure_ascii=False, default=str))


@contextmanager
def json_logs(level: int = logging.INFO) -> Iterator[None]:
    """Writes all records, and Python's warnings, as JSON lines to stderr; undone at the end.

    Args:
        level: Of foveate, uvicorn and Ray; other libraries keep theirs, which is WARNING unless they say otherwise. One
            with handlers of its own that hands nothing on writes as before.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root, levelled = logging.getLogger(), [logging.getLogger(name) for name in _LEVELLED]
    before = [(log, log.level) for log in levelled]
    root.addHandler(handler)
    for log in levelled:
        log.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        for log, old in before:
            log.setLevel(old)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLog:
    """Lines about requests: `accepted`, `done` with what ran, and `answered` with what HTTP said.

    Attributes:
        shows_prompts: Whether prompts and negative prompts are logged.
    """

    shows_prompts: bool = False

    def watch(self, request_id: str, work: Work, listener: Listener) -> Listener:
        """A listener that logs the end of a request and hands events on; made just before the work is submitted."""
        return _Watch(self, request_id, work, listener)

    def accepted(self, request_id: str, work: Work, *, position: int, user: str | None = None) -> None:
        """Logs what was accepted.

        Args:
            request_id: Of the header `x-request-id`.
            work: Its key is not logged.
            position: Of the ticket.
            user: The field of this name, as the client sent it.
        """
        _write("accepted", request_id, **self._asked(work), position=position, user=user)

    def answered(
        self, request_id: str, *, method: str, path: str, status: int, seconds: float, reason: str | None = None
    ) -> None:
        """Logs an answer of any endpoint; what probes and Prometheus ask again and again only at DEBUG.

        Args:
            request_id: Of the header `x-request-id`.
            method: Of the request.
            path: The route's template; never a query, which may hold a key.
            status: Of HTTP; 499 where the client went away, and that of the error where a stream ended with one.
            seconds: From the first byte of the request to the last one of the answer.
            reason: Why a request was refused, one of `metrics.Reason`.
        """
        milliseconds = _rounded(seconds * 1e3)
        level = logging.DEBUG if path in _PROBES else logging.INFO
        _write("answered", request_id, level, method=method, path=path, status=status, ms=milliseconds, reason=reason)

    def _asked(self, work: Work) -> dict[str, Any]:
        job = work.job
        texts = {"prompt": job.prompts[0], "negative_prompt": None if job.negatives is None else job.negatives[0]}
        return {
            "policy": job.policy.spec,
            "seeds": list(job.seeds),
            "size": f"{job.kept['width']}x{job.kept['height']}",
            "latency_budget_ms": work.budget_ms,
            **(texts if self.shows_prompts else {}),
        }


class _Watch:
    """The listener of one request."""

    def __init__(self, log: RequestLog, request_id: str, work: Work, listener: Listener) -> None:
        self._log, self._id, self._work, self._listener = log, request_id, work, listener
        self._began = time.monotonic()
        self._queue_ms: float | None = None
        self._first_ms: float | None = None
        self._scale_ms: dict[int, float] = {}
        self._images, self._is_coarse = 0, False

    def __call__(self, event: Event) -> None:
        """Remembers what the last line will say."""
        match event:
            case Started():
                self._queue_ms = event.waited_ms if self._queue_ms is None else self._queue_ms
            case ScaleDone():
                self._scale_ms[event.scale] = self._scale_ms.get(event.scale, 0.0) + event.ms
                self._seen(event.image is not None)
            case ImageDone():
                self._images += 1
                self._is_coarse |= event.is_coarse
                self._seen(is_image=True)
            case Finished():
                self._done("coarse" if self._is_coarse else "finished")
            case Failed(error=error):
                self._done(outcome_of(error), error)
        self._listener(event)

    def _seen(self, is_image: bool) -> None:
        if is_image and self._first_ms is None:
            self._first_ms = self._now()

    def _now(self) -> float:
        return (time.monotonic() - self._began) * 1e3

    def _done(self, outcome: str, error: Exception | None = None) -> None:
        """One line; an error that is nobody's wish comes with its trace."""
        policy, seeds = self._work.job.policy.spec, list(self._work.job.seeds)
        _write(
            "done",
            self._id,
            logging.ERROR if outcome == "failed" else logging.INFO,
            error if outcome == "failed" else None,
            outcome=outcome,
            policy=policy,
            seeds=seeds,
            images=self._images,
            queue_ms=_rounded(self._queue_ms),
            first_image_ms=_rounded(self._first_ms),
            scale_ms=[_rounded(ms) for _, ms in sorted(self._scale_ms.items())],
            total_ms=_rounded(self._now()),
        )


def _write(
    event: str, request_id: str, level: int = logging.INFO, error: Exception | None = None, **fields: object
) -> None:
    """One record; fields without a value are left out."""
    found = {"request_id": request_id, **{name: value for name, value in fields.items() if value is not None}}
    logger.log(level, event, exc_info=error, extra={"fields": found})


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 2)
