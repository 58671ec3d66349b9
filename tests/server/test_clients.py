"""OpenAI's own clients, unmodified, over real connections."""

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which

import numpy as np
import openai
import pytest

from foveate.pipeline.pipeline import Pipeline
from foveate.server.keys import Keys
from tests.server.conftest import PROMPT, Live
from tests.server.test_api import pixels, solo

KEY = "sk-a-key-of-this-test"


@pytest.fixture(scope="module")
def guarded(start: Callable[..., Live]) -> Live:
    """A server that asks for a key."""
    return start(keys=Keys(environment=KEY))


@pytest.fixture
def client(guarded: Live):
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def test_the_python_client_generates(client: openai.OpenAI, toy_pipe: Pipeline) -> None:
    reply = client.images.generate(
        model="toy", prompt=PROMPT, n=1, size="256x256", quality="high", output_format="png", user="me",
        extra_body={"seed": 7},
    )  # fmt: skip
    (image,) = reply.data
    assert np.array_equal(pixels(image.b64_json), solo(toy_pipe))
    assert (reply.size, reply.quality, reply.output_format, reply.background) == ("256x256", "high", "png", "opaque")
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.model_extra["foveate"]["images"][0]["seed"] == 7


def test_the_python_client_fetches_urls(client: openai.OpenAI, guarded: Live, toy_pipe: Pipeline) -> None:
    reply = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 7})
    url = reply.data[0].url
    path = url.removeprefix(guarded.url)
    assert guarded.send(path).status == 401
    found = guarded.send(path, headers={"Authorization": f"Bearer {KEY}"})
    assert found.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(found.body), solo(toy_pipe))


def test_the_python_client_streams(client: openai.OpenAI, toy_pipe: Pipeline) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7})
    events = list(stream)
    assert [type(event).__name__ for event in events] == [
        "ImageGenPartialImageEvent", "ImageGenPartialImageEvent", "ImageGenCompletedEvent",
    ]  # fmt: skip
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[2].usage.output_tokens > 0
    assert np.array_equal(pixels(events[2].b64_json), solo(toy_pipe))


def test_the_python_client_reads_errors(client: openai.OpenAI, guarded: Live) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, size="100x100")
    assert refused.value.param == "size"
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.images.edit(image=b"x", prompt=PROMPT)
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.images.generate(prompt=PROMPT)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    assert [model.id for model in client.models.list()] == ["toy"]


_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3], maxRetries: 0 });
const reply = await client.images.generate({ prompt: "a red cat", seed: 7, response_format: "b64_json" });
const stream = await client.images.generate({ prompt: "a red cat", seed: 7, stream: true, partial_images: 2 });
const types = [];
let last;
for await (const event of stream) { types.push(event.type); last = event; }
let param = null;
try { await client.images.generate({ prompt: "a red cat", size: "1x1" }); } catch (error) { param = error.param; }
console.log(JSON.stringify({ image: reply.data[0].b64_json, types, last: last.b64_json, param }));
"""


@pytest.mark.soak
def test_the_javascript_client(guarded: Live, toy_pipe: Pipeline, tmp_path: Path) -> None:
    if which("node") is None or which("npm") is None:
        pytest.skip("needs node and npm")
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}', encoding="utf-8")
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "openai"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (tmp_path / "run.mjs").write_text(_SCRIPT, encoding="utf-8")
    command = ["node", "run.mjs", f"{guarded.url}/v1", KEY]
    ran = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=120, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["types"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert found["param"] == "size"
    for name in ("image", "last"):
        assert np.array_equal(pixels(base64.b64decode(found[name])), solo(toy_pipe))
