"""Log lines: one JSON object each, with what ran, and without prompts and keys."""

import io
import json
import logging
import warnings
from contextlib import redirect_stderr
from typing import Any

import pytest

from foveate.core.errors import Cancelled
from foveate.pipeline.pipeline import Pipeline
from foveate.server.logs import RequestLog, json_logs
from foveate.server.work import Failed
from tests.server.observed import PROMPT, events_of, request


def logged(write: Any, level: int = logging.INFO) -> tuple[str, list[dict[str, Any]]]:
    """The text of all lines, and each of them read."""
    stream = io.StringIO()
    with redirect_stderr(stream), json_logs(level):
        write()
    return stream.getvalue(), [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("shows_prompts", [False, True])
def test_a_request_from_acceptance_to_answer(toy_pipe: Pipeline, shows_prompts: bool) -> None:
    work = request(toy_pipe, policy="skip-scales:count=2", negative_prompt="blue")
    events, heard = events_of(toy_pipe, work), list[Any]()
    log = RequestLog(shows_prompts=shows_prompts)

    def write() -> None:
        listener = log.watch("req-1", work, heard.append)
        log.accepted("req-1", work, position=3, user="ann")
        for event in events:
            listener(event)
        log.answered("req-1", method="POST", path="/v1/images/generations", status=200, seconds=0.75)

    text, (accepted, done, answered) = logged(write)
    assert heard == events
    assert [line["event"] for line in (accepted, done, answered)] == ["accepted", "done", "answered"]
    assert {line["request_id"] for line in (accepted, done, answered)} == {"req-1"}
    assert (accepted["position"], accepted["user"], accepted["seeds"]) == (3, "ann", [7])
    assert (done["policy"], done["outcome"], done["queue_ms"]) == (work.job.policy.spec, "finished", 250.0)
    assert done["scale_ms"] == [10.0 * (s + 1) for s in range(len(work.job.schedule))]
    assert done["total_ms"] >= done["first_image_ms"] >= 0
    assert (answered["status"], answered["ms"]) == (200, 750.0)
    assert "sk-secret" not in text
    assert (accepted.get("prompt"), accepted.get("negative_prompt")) == (
        (PROMPT, "blue") if shows_prompts else (None, None)
    )
    assert (PROMPT in text) is shows_prompts


def test_probes_are_logged_only_where_everything_is() -> None:
    def write() -> None:
        for path in ("/ready", "/metrics", "/v1/models"):
            RequestLog().answered("req-3", method="GET", path=path, status=200, seconds=0.1)

    _, lines = logged(write)
    assert [line["path"] for line in lines] == ["/v1/models"]
    _, lines = logged(write, logging.DEBUG)
    assert len(lines) == 3


def test_only_an_error_that_nobody_wished_has_a_trace(toy_pipe: Pipeline) -> None:
    def write() -> None:
        for error in (Cancelled(), RuntimeError("boom")):
            RequestLog().watch("req-2", request(toy_pipe), lambda _: None)(Failed(error=error))

    _, (cancelled, failed) = logged(write)
    assert (cancelled["level"], cancelled["outcome"]) == ("info", "cancelled")
    assert "trace" not in cancelled
    assert (failed["level"], failed["outcome"], failed["error_type"]) == ("error", "failed", "RuntimeError")
    assert "boom" in failed["trace"]


def test_records_of_other_libraries_become_lines_too_and_keys_are_masked() -> None:
    def write() -> None:
        logging.getLogger("uvicorn.error").warning("header %s was odd", "Authorization: Bearer sk-12345")
        logging.getLogger("foveate.server").error("a stream failed", extra={"request_id": "req-4"})
        logging.getLogger("foveate").info("two\nlines, api_key=sk-67890 and x-api-key: 'sk-abcde'")

    text, (other, failed, own) = logged(write)
    assert (other["logger"], other["level"]) == ("uvicorn.error", "warning")
    assert failed["request_id"] == "req-4"
    assert own["event"].startswith("two\nlines")
    for key in ("sk-12345", "sk-67890", "sk-abcde"):
        assert key not in text
    assert text.count("***") == 3


def test_the_loggers_are_as_they_were_afterwards() -> None:
    log = logging.getLogger("foveate")
    before = (log.level, log.propagate, list(log.handlers))
    logged(lambda: None)
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_every_library_writes_json() -> None:
    def write() -> None:
        logging.getLogger("another.library").warning("key: %s", "api_key=sk-secret")
        logging.getLogger("another.library").info("not this")
        logging.getLogger("uvicorn.error").info("a start")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)

    text, lines = logged(write)
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("another.library", "warning"), ("uvicorn.error", "info"), ("py.warnings", "warning")
    ]  # fmt: skip
    assert "DeprecationWarning: old" in lines[2]["event"]
    assert "sk-secret" not in text
