"""The demo of Gradio: what it sends, and that a browser shows it."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch

from foveate.models.var import VAR
from foveate.tokenizers.autoencoder import Autoencoder
from tests.pipeline.test_published import TOY_VAR, VQ, filled
from tests.viz.browser import DESKTOP, chromium

DEMO = Path(__file__).parents[2] / "examples/gradio_demo.py"

# Found, and not imported: gradio leaves an event loop open, so it runs in processes of its own.
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed"),
]

SCRIPT = """
import runpy, sys
import numpy as np

demo = runpy.run_path(sys.argv.pop(1))
sent = list(demo["generate"]("a red cat", "skip-scales:count=1", 7, demo["OWN_SIZE"]))
assert [sheet is None for _, sheet, _ in sent] == [True] * 6 + [False], sent
wanted = demo["pipe"]("a red cat", seed=7, policy="skip-scales:count=1", trace=True).images[0]
assert np.array_equal(np.asarray(sent[-1][0]), np.asarray(wanted))
try:
    next(demo["generate"]("a red cat", "nope", 7, demo["OWN_SIZE"]))
except demo["gradio"].Error as error:
    print(sent[-1][2], "|", error.message.partition(";")[0])
"""


def test_the_demo_sends_every_scale_and_the_map_at_the_end(toy_folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(DEMO), str(toy_folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "scale 7: 0 of 256 tokens | no policy 'nope'", ran.stderr


CLASS_SCRIPT = """
import runpy, sys

demo = runpy.run_path(sys.argv.pop(1))
prompt = demo["demo"].input_components[0].value
*_, (image, sheet, said) = demo["generate"](prompt, "full", 7, demo["OWN_SIZE"])
assert sheet is not None
print(prompt, image.size, said)
"""


def test_the_demo_offers_a_class_where_a_model_knows_classes(tmp_path: Path) -> None:
    torch.save(filled(VAR(TOY_VAR)).state_dict(), tmp_path / "var_toy.pth")
    torch.save(filled(Autoencoder(VQ), 2).state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    command = [sys.executable, "-c", CLASS_SCRIPT, str(DEMO), str(tmp_path / "var_toy.pth")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "0 (256, 256) scale 10: 256 of 256 tokens", ran.stderr


@pytest.fixture
def url(toy_folder: Path) -> Iterator[str]:
    """The demo in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, str(DEMO), str(toy_folder)], env=os.environ | own)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urlopen(address, timeout=5):
                    break
            except (URLError, OSError):
                assert process.poll() is None, "the demo ended"
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_a_browser_shows_the_image_and_the_map(url: str) -> None:
    with chromium() as browser:
        context = browser.new_context(**DESKTOP)
        page: Any = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(url)
        page.get_by_label("prompt").fill("a red cat")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_function("document.querySelectorAll('.image-container img').length == 2")
        sizes = page.eval_on_selector_all(".image-container img", "all => all.map(one => one.naturalWidth)")
        assert sizes[0] == 256
        assert sizes[1] > 700
        assert page.get_by_label("progress").input_value().startswith("scale 7: ")
        if (shot := os.environ.get("FOVEATE_SCREENSHOT")) is not None:
            page.screenshot(path=shot, full_page=True)
        context.close()
