"""Streams: OpenAI's events and ours, in order, with real coarse images; and what ends them."""

import asyncio
import base64
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.eval.fidelity import psnr
from foveate.pipeline.pipeline import Pipeline
from foveate.server.admission import asked_of
from foveate.server.exchange import Exchange
from foveate.server.schemas import ImageRequest
from foveate.server.service import Service
from foveate.server.settings import ServerSettings
from foveate.server.work import Finished, ScaleDone
from tests.server.conftest import PROMPT, Live, eventually
from tests.server.observed import events_of, request
from tests.server.test_api import pixels, solo
from tests.server.test_metrics import value

LAST = 6
"""The toy's last scale."""


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == kind]


def test_partial_images_come_before_each_image(live: Live, toy_pipe: Pipeline) -> None:
    events = live.generate(stream=True, partial_images=3, n=2, output_format="png").events
    assert {event["type"] for event in events} == {"image_generation.partial_image", "image_generation.completed"}
    for index in range(2):
        own = [event for event in events if event["image_index"] == index]
        partials, (done,) = own[:-1], own[-1:]
        assert [event["partial_image_index"] for event in partials] == [0, 1, 2]
        assert done["type"] == "image_generation.completed"
        final = pixels(done["b64_json"])
        assert np.array_equal(final, solo(toy_pipe, seed=7 + index))
        near = [psnr(pixels(event["b64_json"])[None], final[None])[0] for event in partials]
        assert near == sorted(near)
        assert near[0] < 100
        assert set(done) == {
            "type", "b64_json", "background", "created_at", "output_format", "quality", "size", "image_index", "usage",
            "foveate",
        }  # fmt: skip
        assert done["foveate"]["seed"] == 7 + index
        assert set(partials[0]) == {
            "type", "b64_json", "background", "created_at", "output_format", "quality", "size", "image_index",
            "partial_image_index",
        }  # fmt: skip


def test_without_partial_images_one_event_comes(live: Live) -> None:
    answer = live.generate(stream=True)
    assert [event["type"] for event in answer.events] == ["image_generation.completed"]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_trace_shows_every_scale(live: Live, toy_pipe: Pipeline) -> None:
    answer = live.generate(stream=True, partial_images=1, trace=True, policy="skip-scales:count=2|drop-branch")
    events = answer.events
    first = events[0]
    assert first["type"] == "foveate.accepted"
    assert (first["id"], first["seeds"], first["size"]) == (answer.headers["x-request-id"], [7], "256x256")
    assert (first["model"], first["num_scales"]) == ("toy", LAST + 1)
    scales = of(events, "foveate.scale")
    assert [event["scale"] for event in scales] == list(range(LAST + 1))
    for event in scales:
        h, w = event["grid"]
        assert pixels(event["b64_json"]).shape == (256, 256, 3)
        assert len(base64.b64decode(event["depth"]["b64"])) == h * w
        assert event["depth"]["num_blocks"] == 3
        assert event["tokens"]["full"] == h * w
    assert scales[LAST]["tokens"]["run"] == 0
    assert set(base64.b64decode(scales[0]["depth"]["b64"])) == {3}
    (done,) = of(events, "image_generation.completed")
    assert events[-1] is done
    assert [s["tokens"] for s in done["foveate"]["scales"]] == [s["tokens"] for s in scales]
    near = psnr(pixels(scales[LAST]["b64_json"])[None], pixels(done["b64_json"])[None])[0]
    assert near > 20


def test_a_comparison_streams_both_sides(live: Live) -> None:
    body = {"prompt": PROMPT, "seed": 7, "policy_a": "skip-scales:count=2", "stream": True, "trace": True}
    events = live.send("/v1/images/compare", body).events
    assert [event["side"] for event in of(events, "foveate.accepted")] == ["a", "b"]
    assert sorted(event["side"] for event in of(events, "image_generation.completed")) == ["a", "b"]
    assert {event["side"] for event in of(events, "foveate.scale")} == {"a", "b"}
    (compared,) = of(events, "foveate.compared")
    assert events[-1] is compared
    assert compared["fidelity"]["flops_ratio"] < 1


def test_an_error_ends_a_stream(start: Callable[..., Live]) -> None:
    live = start(moderation=lambda _prompt, image: None if image is None else "no images today")
    events = live.generate(stream=True).events
    assert [event["type"] for event in events] == ["error"]
    assert events[0]["error"]["code"] == "moderation_blocked"
    metrics = live.service.metrics
    eventually(lambda: value(metrics, "foveate_requests_total", status="400", policy="full") == 1, "it is counted")
    assert value(metrics, "foveate_requests_total", status="200", policy="full") is None
    assert value(metrics, "foveate_rejected_total", reason="moderation") == 1
    assert live.refused()["message"] == "the image was refused: no images today"


def unreachable(_prompt: str, _image: Any) -> None:
    """A check that asks another server, which is down."""
    raise ConnectionRefusedError("no such server")


@pytest.mark.parametrize(
    ("check", "status", "message"),
    [
        (unreachable, 500, "the server failed; its log says why"),
        (lambda prompt, image: "not this" if "cat" in prompt else None, 400, "the prompt was refused: not this"),
        (lambda prompt, image: False, 500, "the server failed; its log says why"),
        (lambda prompt, image: 1 / 0, 500, "the server failed; its log says why"),
    ],
)
def test_what_the_operator_refuses(start: Callable[..., Live], check: Any, status: int, message: str) -> None:
    live = start(moderation=check)
    assert live.refused(status)["message"] == message
    assert live.service.stats().queued_images == 0
    assert live.generate(prompt="a dog").status == (200 if status == 400 else 500)


def test_a_check_that_hangs_holds_up_nobody(start: Callable[..., Live], caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def check(prompt: str, _image: Any) -> None:
        if not over.is_set() and "cat" in prompt:
            over.wait(30)

    live = start(moderation=check, moderation_seconds=0.1)
    try:
        for _ in range(8):
            error = live.refused(503)
            assert (error["code"], error["type"]) == ("moderation_timeout", "server_error")
        assert "took longer than 0.1 s" in caplog.text
        assert live.generate(prompt="a dog").error["code"] == "moderation_timeout"
        assert "8 earlier calls of the moderation check hang" in caplog.text
        rejected = functools.partial(value, live.service.metrics, "foveate_rejected_total")
        eventually(lambda: rejected(reason="moderation_timeout") == 9, "they are counted")
    finally:
        over.set()
    eventually(lambda: live.generate(prompt="a dog").status == 200, "they have ended")


def test_a_late_stream_ends_with_an_error(live: Live) -> None:
    events = live.generate(stream=True, latency_budget_ms=0.001, on_late="error").events
    assert [event["type"] for event in events] == ["error"]
    assert events[0]["error"]["code"] == "late"


async def taken_slowly(pipe: Pipeline, scales: Sequence[ScaleDone], late: ScaleDone) -> list[ScaleDone]:
    """What a client gets that reads its first event when all scales are there, and all but that one behind `late`."""
    settings = ServerSettings()
    service = Service(settings)
    try:
        asked = asked_of(ImageRequest(prompt=PROMPT, seed=7), pipe, settings, "local")
        exchange = Exchange(service, [asked], "id", "local")
        (side,) = exchange.sides
        listen = exchange._listener(side)
        await asyncio.to_thread(lambda: [listen(scale) for scale in scales])
        found = []
        async for _, event in exchange.events():
            if not found:
                await asyncio.to_thread(listen, late)
                await asyncio.to_thread(listen, Finished(total_ms=1.0))
            if isinstance(event, ScaleDone):
                found.append(event)
        exchange.leave()
        return found
    finally:
        service.release()


def test_images_of_scales_that_nobody_reads_are_dropped(toy_pipe: Pipeline) -> None:
    image = Image.new("RGB", (2048, 2048))
    event = next(e for e in events_of(toy_pipe, request(toy_pipe)) if isinstance(e, ScaleDone))
    scale = replace(event, image=image, partial=None)
    # Five of 12 MiB fit; a partial image always comes.
    scales = [*[replace(scale, scale=index) for index in range(7)], replace(scale, scale=7, partial=0)]
    found = asyncio.run(taken_slowly(toy_pipe, scales, replace(scale, scale=8)))
    assert [event.scale for event in found] == list(range(9))
    assert [event.scale for event in found if event.image is None] == [5, 6]
