"""The server's page in a real browser: opened, watched for complaints, and asked what it shows."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

TIMEOUT_MS = 120_000


@contextmanager
def visited(
    browser: Any, url: str, *, expects: Sequence[str] = (), is_ready: bool = True, **options: Any
) -> Iterator[Any]:
    """The page; fails the test if it complains, breaks its policy, or asks another host.

    Args:
        browser: From `tests.viz.browser.chromium`.
        url: Of the server, with what stands behind "#".
        expects: Parts of complaints that belong to the test.
        is_ready: Whether the page is waited for until its form is filled.
        options: Of the browser's context.
    """
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    host = url.partition("#")[0].rstrip("/")
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith((host, "blob:", "data:")) else complaints.append(sent.url[:80]),
    )
    try:
        page.goto(url)
        if is_ready:
            page.wait_for_selector("html[data-ready]", state="attached")
        yield page
        complaints = [line for line in complaints if not any(part in line for part in expects)]
        if complaints:
            pytest.fail(f"the page complains: {complaints}")
    finally:
        context.close()


def choose(page: Any, level: str) -> None:
    """Chooses a level of compute as a reader does."""
    page.locator(f'.sv-level:has(input[value="{level}"])').click()


def says(page: Any, text: str) -> None:
    """Waits until the status line has a text."""
    page.locator("#status").filter(has_text=text).wait_for()


def generated(page: Any) -> None:
    """Asks for an image and waits until it, and what it is compared with, is done."""
    page.locator("#go").click()
    says(page, "Done")


def pixels(page: Any, selector: str) -> np.ndarray:
    """What an image or a canvas shows."""
    uri = page.locator(selector).evaluate(
        "shown => { if (shown.tagName === 'CANVAS') return shown.toDataURL();"
        " const canvas = document.createElement('canvas');"
        " [canvas.width, canvas.height] = [shown.naturalWidth, shown.naturalHeight];"
        " canvas.getContext('2d').drawImage(shown, 0, 0); return canvas.toDataURL(); }"
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def figures(page: Any) -> dict[str, str]:
    """The numbers beside the image."""
    names, values = page.locator("#figures dt").all_inner_texts(), page.locator("#figures dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def view(page: Any, name: str) -> None:
    """Chooses a view of the image, and waits until it is drawn."""
    page.locator(f'.fv-tab:has(input[value="{name}"])').click()
    page.wait_for_selector(f'foveate-view[data-view="{name}"]')
    if name in ("difference", "compute"):
        page.wait_for_selector(f'.fv-canvas[aria-label^="{name}" i]')
