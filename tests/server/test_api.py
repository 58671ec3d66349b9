"""The images API: what comes back for every field, what is refused and with which field, and what is listed."""

import base64
import functools
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.eval.fidelity import psnr
from foveate.pipeline.encoding import Encoder
from foveate.pipeline.options import OPTIONS
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import read_image_config, regenerate
from foveate.policies.registry import PRESETS, REGISTRY, load_policy
from foveate.server.admission import QUALITIES, asked_of
from foveate.server.app import create_app
from foveate.server.limits import Limits
from foveate.server.reproduce import Origin, command_of, curl_of
from foveate.server.schemas import ImageRequest
from foveate.server.settings import ServerSettings
from tests.server.conftest import PROMPT, Live
from tests.server.test_metrics import value


def pixels(content: str | bytes) -> np.ndarray:
    """Of a file, or of one as base64."""
    raw = base64.b64decode(content) if isinstance(content, str) else content
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


@functools.cache
def _solo(pipe: Pipeline, options: str) -> Image.Image:
    return pipe(PROMPT, **json.loads(options)).images[0]


def solo(pipe: Pipeline, **options: Any) -> np.ndarray:
    """What the library makes of the same call."""
    return np.asarray(_solo(pipe, json.dumps({"seed": 7, **options})))


def test_an_image_is_that_of_the_library(live: Live, toy_pipe: Pipeline, tmp_path: Path) -> None:
    answer = live.generate(seed=0, negative_prompt="a dog", guidance_scale=3, temperature=[0.5] * 7, top_k=0, user="u")
    assert answer.status == 200, answer.body
    data = answer.data
    assert set(data) == {"created", "data", "background", "output_format", "quality", "size", "usage", "foveate"}
    assert (data["background"], data["output_format"], data["quality"], data["size"]) == (
        "opaque", "png", "high", "256x256",
    )  # fmt: skip
    (image,), (info,) = data["data"], data["foveate"]["images"]
    assert set(image) == {"b64_json"}
    expected = solo(toy_pipe, seed=0, negative_prompt="a dog", guidance_scale=3, temperature=[0.5] * 7)
    assert np.array_equal(pixels(image["b64_json"]), expected)
    assert info["seed"] == 0
    assert info["policy"]["spec"] == data["foveate"]["policy"]["spec"] == "full"
    assert info["flops"]["run"] == info["flops"]["full"] > 0
    assert [scale["grid"] for scale in info["scales"]][-1] == [16, 16]
    assert all(scale["ms"] > 0 for scale in info["scales"])
    assert data["usage"]["output_tokens"] == sum(h * w for h, w in (scale["grid"] for scale in info["scales"]))
    assert data["usage"]["input_tokens"] == data["usage"]["input_tokens_details"]["text_tokens"] > 0
    assert data["foveate"]["id"] == answer.headers["x-request-id"]
    path = tmp_path / "a.png"
    path.write_bytes(base64.b64decode(image["b64_json"]))
    assert read_image_config(path)["prompt"] == PROMPT
    assert regenerate(path, toy_pipe).is_identical


@pytest.mark.soak
def test_as_many_images_as_asked_from_one_seed_on(live: Live, toy_pipe: Pipeline) -> None:
    data = live.generate(n=2).data
    assert [info["seed"] for info in data["foveate"]["images"]] == [7, 8]
    for index, image in enumerate(data["data"]):
        assert np.array_equal(pixels(image["b64_json"]), solo(toy_pipe, seed=7 + index))


@pytest.mark.parametrize(("kind", "compression"), [("jpeg", 40), ("webp", 0)])
def test_files_are_in_the_format_that_was_asked_for(
    live: Live, toy_pipe: Pipeline, tmp_path: Path, kind: str, compression: int
) -> None:
    content = live.generate(output_format=kind, output_compression=compression).data["data"][0]["b64_json"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(base64.b64decode(content))
    stored = read_image_config(path)["encoder"]
    assert (stored["format"], stored["quality"]) == (kind, max(1, compression))
    encoder = Encoder.from_json(stored)
    assert np.array_equal(pixels(content), encoder.decoded(Image.fromarray(solo(toy_pipe))))


@pytest.mark.parametrize("quality", QUALITIES)
def test_quality_is_a_policy(toy_pipe: Pipeline, quality: str) -> None:
    spec, shown = QUALITIES[quality]
    body = ImageRequest.model_validate({"prompt": PROMPT, "quality": quality})
    asked = asked_of(body, toy_pipe, ServerSettings(), "local")
    assert asked.job.policy == load_policy(spec)
    assert asked.quality == shown


def test_a_policy_and_a_budget_of_ones_own(live: Live, toy_pipe: Pipeline) -> None:
    data = live.generate(policy="skip_scales:count=2").data
    assert data["quality"] is None
    assert data["foveate"]["policy"]["spec"] == "skip-scales:count=2"
    assert np.array_equal(pixels(data["data"][0]["b64_json"]), solo(toy_pipe, policy="skip-scales:count=2"))
    info = live.generate(budget=0.5).data["foveate"]["images"][0]
    assert info["flops"]["run"] / info["flops"]["full"] == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "  "}, "prompt", "must not be empty"),
        ({"prompt": 3}, "prompt", "valid string, got 3"),
        ({"prompt": "a\0"}, "prompt", "not text"),
        ({"prompt": "x" * 4001}, "prompt", "4000 characters or less, got 4001"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 11}, "n", "n must be 1 to 10, got 11"),
        ({"size": "257x256"}, "size", "nearest of 60"),
        ({"size": "1:1"}, "size", "WIDTHxHEIGHT"),
        ({"seed": -1}, "seed", "seed must be"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"seed": 2**70}, "seed", "seed must be"),
        ({"temperature": 0}, "temperature", "temperature must be"),
        ({"temperature": [1.0]}, "temperature", "one per scale"),
        ({"guidance_scale": "3"}, "guidance_scale", "valid number"),
        ({"top_p": 2}, "top_p", "in [0, 1]"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"negative_prompt": ""}, "negative_prompt", "must not be empty"),
        ({"quality": "best"}, "quality", "input should be"),
        ({"quality": "low", "policy": "full"}, "quality", "not both"),
        ({"policy": "ld-prunin"}, "policy", "did you mean ld-pruning"),
        ({"policy": "ld-pruning:energy_shar=1"}, "policy", "did you mean energy_share"),
        ({"policy": "skip-scales:count=99"}, "policy", "99"),
        ({"policy": ""}, "policy", "no policy ''"),
        ({"policy": "a" * 100_000}, "policy", "at most 500 characters"),
        ({"policy": "|".join(["full"] * 9)}, "policy", "8 parts or less, got 9"),
        ({"policy": "step-down:steps=[null]"}, "policy", "steps must be a list of specs"),
        ({"policy": "step-down:steps=[[1,1]]"}, "policy", "steps must be a list of specs"),
        ({"policy": "step-down:steps=[[{policy: [1]}]]"}, "policy", "steps must be a list of specs"),
        ({"policy": "step-down:steps=[[{policy: full, 1: 2}]]"}, "policy", "steps must be a list of specs"),
        ({"policy": "skip-scales:count=[&a [1,1],*a]"}, "policy", "not written as a list"),
        ({"policy": "skip-scales:count=" + "[" * 480}, "policy", "not written as a list"),
        ({"policy": "skip-scales:count=[2001-13-45]"}, "policy", "not written as a list"),
        ({"budget": 2}, "budget", "budget must be"),
        ({"budget": 0.5, "quality": "low"}, "quality", "not both"),
        ({"latency_budget_ms": 0}, "latency_budget_ms", "above 0"),
        ({"on_late": "error"}, "on_late", "needs a latency_budget_ms"),
        ({"output_format": "gif"}, "output_format", "input should be"),
        ({"output_compression": 50}, "output_compression", "png is lossless"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "less than or equal to 100"),
        (
            {"output_format": "jpeg", "prompt": "\N{ROCKET}" * 4000, "negative_prompt": "x" * 4000},
            "output_format",
            "too long to be stored in a jpeg",
        ),
        ({"background": "transparent"}, "background", "opaque"),
        ({"response_format": "url", "stream": True}, "response_format", "a stream carries its images"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"partial_images": 1}, "partial_images", "needs stream"),
        ({"trace": True}, "trace", "needs stream"),
        ({"sizee": 1}, "sizee", "did you mean size"),
        ({"x" * 5000: 1}, "x" * 77 + "...", "no field"),
        ({"user": "u" * 300}, "user", "256"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(live: Live, fields: dict[str, Any], param: str, message: str) -> None:
    error = live.refused(**fields)
    assert error["param"] == param
    assert message.lower() in error["message"].lower()
    assert len(error["message"]) <= 1000
    assert error["type"] == "invalid_request_error"


def test_a_size_that_is_not_names_the_nearest_three(live: Live) -> None:
    message = live.refused(size="250x260")["message"]
    assert "256x256" in message
    assert message.count("x") >= 4
    assert "/v1/sizes" in message


@pytest.mark.parametrize("size", ["big", "1:1", "256", "0x256"])
def test_what_is_no_size_names_some_that_are(live: Live, size: str) -> None:
    message = live.refused(size=size)["message"]
    assert "such as 256x256, " in message
    assert "/v1/sizes" in message


def test_null_is_absent(live: Live, toy_pipe: Pipeline) -> None:
    nothing = {name: None for name in ImageRequest.model_fields if name not in ("prompt", "seed")}
    answer = live.generate(**nothing)
    assert answer.status == 200, answer.body
    assert np.array_equal(pixels(answer.data["data"][0]["b64_json"]), solo(toy_pipe))


def test_fields_without_effect_warn(live: Live) -> None:
    data = live.generate(style="vivid", moderation="low", background="opaque", safety_identifier="x").data
    codes = {warning["code"] for warning in data["foveate"]["warnings"]}
    assert {"style_ignored", "moderation_ignored"} <= codes
    assert live.generate(size="128x384").status == 400


@pytest.mark.parametrize("model", ["gpt-image-1", "../../etc/passwd", "/etc/passwd", "toy/../toy", ""])
def test_another_model_is_not_found(live: Live, model: str) -> None:
    error = live.refused(404, model=model)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"].endswith("there is toy")


def test_a_policy_is_never_a_path(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy: skip-scales\ncount: 2\n", encoding="utf-8")
    assert load_policy(file).spec == "skip-scales:count=2"
    for spec in (str(file), f"full|{file}", "../presets/preset-draft.yaml", "file:///etc/passwd", "full|../x.yml"):
        error = live.refused(policy=spec)
        assert error["param"] == "policy"
        assert "count" not in error["message"]


@pytest.mark.parametrize("path", ["edits", "variations"])
def test_edits_and_variations_are_not_found(live: Live, path: str) -> None:
    before = value(live.service.metrics, "foveate_rejected_total", reason="invalid")
    answer = live.send(f"/v1/images/{path}", {"prompt": "x"})
    assert answer.status == 404
    assert "no edits" in answer.error["message"]
    assert value(live.service.metrics, "foveate_rejected_total", reason="invalid") == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 404), ("PUT", "/v1/images/generations", 405)],
)
def test_what_there_is_not_comes_in_the_envelope(live: Live, method: str, path: str, status: int) -> None:
    answer = live.send(path, method=method)
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"


def test_a_deadline_cuts_or_refuses(live: Live) -> None:
    error = live.refused(504, latency_budget_ms=0.001, on_late="error")
    assert (error["param"], error["code"]) == ("latency_budget_ms", "late")
    in_time = live.generate(latency_budget_ms=60_000).data["foveate"]["images"][0]
    assert not in_time["is_coarse"]


def test_pixels_are_limited(start: Callable[..., Live]) -> None:
    small = start(limits=Limits(pixels=256 * 256, images=2, prompt_chars=20))
    assert small.refused(size="512x512")["param"] == "size"
    assert small.refused(n=3)["param"] == "n"
    assert small.refused(negative_prompt="a" * 21)["param"] == "negative_prompt"
    allowed = {size["size"] for size in small.send("/v1/sizes").data["data"] if size["is_allowed"]}
    assert "256x256" in allowed
    assert "512x512" not in allowed


def test_compare_has_one_seed_and_two_policies(live: Live, toy_pipe: Pipeline) -> None:
    answer = live.send("/v1/images/compare", {"prompt": PROMPT, "seed": 0, "policy_a": "skip-scales:count=2"})
    assert answer.status == 200, answer.body
    data = answer.data
    a, b = (pixels(data[side]["b64_json"]) for side in "ab")
    assert np.array_equal(a, solo(toy_pipe, seed=0, policy="skip-scales:count=2"))
    assert np.array_equal(b, solo(toy_pipe, seed=0))
    assert data["seed"] == data["a"]["foveate"]["seed"] == data["b"]["foveate"]["seed"] == 0
    fidelity = data["fidelity"]
    assert fidelity["psnr"] == pytest.approx(psnr(a[None], b[None])[0])
    assert 0 < fidelity["flops_ratio"] < 1
    assert not fidelity["identical"]
    error = live.send("/v1/images/compare", {"prompt": PROMPT, "policy_a": "full", "policy_b": "fulll"}).error
    assert error["param"] == "policy_b"
    error = live.send("/v1/images/compare", {"prompt": PROMPT, "policy_a": "full", "policy_c": "full"}).error
    assert error["message"].startswith("no field 'policy_c'; did you mean policy_")
    assert live.send("/v1/images/compare", {"prompt": PROMPT}).error["param"] == "policy_a"


def test_how_to_make_it_again(live: Live, toy_pipe: Pipeline) -> None:
    fields = {"negative_prompt": "-x", "temperature": 0.7, "policy": "skip-scales:count=2", "output_format": "jpeg"}
    first = live.generate(**fields).data
    info = first["foveate"]["images"][0]
    words = shlex.split(info["command"])
    assert words[:3] == ["foveate", "generate", PROMPT]
    assert {"--seed", "7", "--size", "256x256", "skip-scales:count=2", "--negative-prompt=-x"} <= set(words)
    words = shlex.split(info["curl"])
    assert words[:2] == ["curl", f"{live.url}/v1/images/generations"]
    again = live.send(body=json.loads(words[-1])).data
    assert again["data"] == first["data"]
    body = ImageRequest.model_validate({"prompt": "-a cat"})
    origin = Origin(base_url="http://a/", has_keys=True, model_flags=("--model", "toy"))
    dashed = asked_of(body, toy_pipe, ServerSettings(), "local")
    assert shlex.split(command_of(dashed, 0, "full", origin))[-4:] == ["--model", "toy", "--", "-a cat"]
    assert '"Authorization: Bearer $FOVEATE_API_KEY"' in curl_of(dashed, 0, "full", origin)


def test_what_is_listed(live: Live) -> None:
    (model,) = live.send("/v1/models").data["data"]
    assert (model["id"], model["object"]) == ("toy", "model")
    assert model["foveate"]["default_size"] == "256x256"
    assert live.send("/v1/models/toy").data == model
    assert live.send("/v1/models/other").error["code"] == "model_not_found"
    sizes = live.send("/v1/sizes").data["data"]
    assert [size["size"] for size in sizes if size["is_default"]] == ["256x256"]
    assert [size["size"] for size in sizes if size["is_trained"]] == ["256x256"]
    assert sum(h * w for h, w in sizes[0]["grids"]) == sizes[0]["tokens"]
    policies = live.send("/v1/policies").data
    assert {policy["name"] for policy in policies["data"]} >= set(REGISTRY)
    assert {preset["name"] for preset in policies["presets"]} == set(PRESETS)
    assert all(policy["title"] for policy in policies["data"] + policies["presets"])
    by_name = {policy["name"]: policy for policy in policies["data"] + policies["presets"]}
    assert by_name["skip-scales"]["fields"][0]["name"] == "count"
    assert by_name["preset-draft"]["bound"] == ["psnr.mean >= 30"]
    assert by_name["preset-draft"]["is_measured"] is False
    possible = [policy["name"] for policy in policies["data"] if policy["is_possible"]]
    assert "full" in possible
    assert all(policy["reason"] for policy in policies["data"] if not policy["is_possible"])


def test_listing_policies_logs_nothing(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    assert live.send("/v1/policies").status == 200
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_how_it_is(live: Live) -> None:
    assert live.send("/health").data == {"status": "alive"}
    ready = live.send("/ready").data
    assert (ready["status"], ready["model"]) == ("ready", "toy")
    assert ready["kernels"]
    assert set(live.send("/version").data) == {"foveate", "torch", "python"}
    assert live.generate().status == 200
    metrics = live.send("/metrics")
    assert b'foveate_requests_total{policy="full",status="200"}' in metrics.body
    assert metrics.headers["content-type"].startswith("text/plain")


def test_a_server_that_loads_says_so(start: Callable[..., Live]) -> None:
    loading = start(is_loaded=False)
    assert loading.send("/health").status == 200
    ready = loading.send("/ready")
    assert (ready.status, ready.data["status"]) == (503, "loading")
    for answer in (loading.generate(), loading.send("/v1/models"), loading.send("/v1/policies")):
        assert (answer.status, answer.error["code"]) == (503, "loading")
        assert int(answer.headers["retry-after"]) >= 1


def test_the_description(live: Live) -> None:
    data = live.send("/openapi.json").data
    assert set(data["paths"]) == {
        "/v1/images/generations", "/v1/images/compare", "/v1/images/{image_id}", "/v1/models", "/v1/models/{name}",
        "/v1/sizes", "/v1/policies", "/health", "/ready", "/metrics", "/version",
    }  # fmt: skip
    generate = data["paths"]["/v1/images/generations"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(generate["responses"])
    assert "text/event-stream" in generate["responses"]["200"]["content"]
    assert "422" not in generate["responses"]
    assert generate["security"]
    fields = data["components"]["schemas"]["ImageRequest"]["properties"]
    assert all(field["description"] for field in fields.values())
    assert fields["seed"]["examples"] == [7]


def test_fields_of_ours_are_options_of_a_call() -> None:
    own = {"negative_prompt", "guidance_scale", "temperature", "top_k", "top_p", "more_smooth", "budget"}
    assert own <= set(OPTIONS)
    for name in own:
        assert OPTIONS[name].help in ImageRequest.model_fields[name].description


def test_the_framework_tells_nobody() -> None:
    app = create_app(None, None, ServerSettings())
    try:
        told = app._native_telemetry.config
        assert not any(told[name] for name in ("tracing", "metrics", "logs", "auto_configure"))
    finally:
        app.state.service.release()


def test_headers_for_security(live: Live) -> None:
    for path in ("/", "/v1/models", "/page/none.js", "/health"):
        headers = live.send(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"]
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers
    assert live.send("/v1/models").headers["cache-control"] == "no-store"
    assert "script-src 'self'" in live.send("/").headers["content-security-policy"]
    assert live.send("/page/viz/view.js").headers["content-type"].startswith("text/javascript")
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "viz/..%2f..%2fpage.py", "view.js"):
        assert live.send(f"/page/{name}").status == 404


def test_other_origins_are_let_in_only_by_name(start: Callable[..., Live]) -> None:
    named = start(origins=("https://example.org",))
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
    answer = named.send(method="OPTIONS", headers=asked)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://example.org")
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    other = named.send(method="OPTIONS", headers={**asked, "Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers
