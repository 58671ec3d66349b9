"""The page is clean by axe-core's rules: light and dark, on a desktop and a phone, in every view.

The rules come with `npm pack` while the test runs; nothing of them is kept.
"""

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.viz.page import render
from tests.viz.browser import DESKTOP, PHONE, chromium, opened
from tests.viz.pages import led_page

pytestmark = pytest.mark.soak
PACKAGE = "axe-core@4.14.1"
VIEWS = ("slider", "side", "difference", "flip", "compute")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    ran = subprocess.run(
        ["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched")
    with tarfile.open(folder / ran.stdout.split()[-1]) as archive:
        return archive.extractfile("package/axe.min.js").read().decode("utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(led_page()), encoding="utf-8")
    return file


def violations(page: Any) -> list[str]:
    found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    return [f"{one['id']}: {node['html'][:120]} ({node['failureSummary']})" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_rule_is_violated(browser: Any, axe: str, path: Path, device: dict[str, Any], scheme: str) -> None:
    with opened(browser, path, color_scheme=scheme, reduced_motion="reduce", **device) as page:
        page.evaluate(axe)
        for view in VIEWS:
            page.locator(f'.fv-tab:has(input[value="{view}"])').click()
            page.wait_for_selector(f'foveate-view[data-view="{view}"]')
            assert violations(page) == []


def test_the_check_can_fail(browser: Any, axe: str, path: Path) -> None:
    with opened(browser, path, **DESKTOP) as page:
        page.evaluate(axe)
        page.evaluate("() => document.querySelector('.pg-choice').replaceWith(document.querySelector('#pg-policy'))")
        assert any(line.startswith("select-name") for line in violations(page))
