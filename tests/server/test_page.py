"""The page in a real browser on a real server and the bundled model: clicks, keys, images, failures."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from foveate.eval.fidelity import psnr
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.pipeline.provenance import read_image_config
from foveate.server.keys import Keys
from foveate.server.limits import Limits
from tests.server.browsing import choose, figures, generated, pixels, says, view, visited
from tests.server.conftest import PATH, Live
from tests.viz.browser import DESKTOP, PHONE, chromium
from tests.viz.test_page_axe import axe, violations  # noqa: F401 - a fixture

pytestmark = pytest.mark.soak
SHARE = "#prompt=penguin&seed=7&level=share&share=50"
FULL = "#prompt=penguin&seed=7&level=full"
LARGE = {"prompt": "cactus", "seed": 1, "size": "1024x1024", "n": 4}
STATUS = "Failed to load resource: the server responded with a status of "


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def toy_pipe() -> Pipeline:
    """The bundled model instead of the toy: its images are some, and the page names it."""
    pipe = Pipeline.from_pretrained("emoji-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    with visited(browser, f"{live.url}/{SHARE}", reduced_motion="reduce", **DESKTOP) as found:
        yield found


def test_an_image_forms_scale_by_scale_and_is_compared_with_its_full_run(page: Any, toy_pipe: Pipeline) -> None:
    assert page.locator(".sv-rung").count() == 7
    assert page.locator(".sv-rung:disabled").count() == 7
    generated(page)
    assert page.locator(".sv-rung.sv-filled").count() == 7
    shares = toy_pipe("penguin", seed=7, budget=0.5)
    ours, full = (stack_uint8(out.images) for out in (shares, toy_pipe("penguin", seed=7)))
    assert np.array_equal(pixels(page, ".fv-picture"), ours[0])
    assert np.array_equal(pixels(page, ".fv-reference"), full[0])
    found = figures(page)
    assert found["FLOPs"].startswith(f"{100 * shares.report.flops_ratio:.0f} %")
    assert found["PSNR"].startswith(f"{psnr(ours, full)[0]:.1f} dB")
    assert found["Tokens"].startswith(str(shares.report.tokens_run))
    assert re.match(r"[\d.]+ m?s\s[\d.]+x speedup; full run", found["Time"])
    assert page.locator("#bars .fv-bar").count() == 14
    view(page, "difference")
    most = np.abs(ours[0].astype(int) - full[0]).max()
    assert page.locator(".fv-caption").inner_text().startswith(f"largest difference {most} of 255")


def test_the_compute_map_follows_the_ladder(page: Any, toy_pipe: Pipeline) -> None:
    generated(page)
    trace = toy_pipe("penguin", seed=7, budget=0.5, trace=True).trace
    kept = trace.scales[-1].keep_Bl[0].view(16, 16).numpy()
    assert 0 < kept.mean() < 1
    page.locator(".sv-rung").last.click()
    page.wait_for_selector('foveate-view[data-view="compute"]')
    page.locator(".fv-caption").filter(has_text=f"scale 6, 16 x 16: {kept.sum()}/256 tokens").wait_for()
    centres = pixels(page, ".fv-canvas")[16::32, 16::32].astype(int)
    dark = centres.max(-1) < 80
    assert not dark[kept].any() or dark[~kept].mean() > dark[kept].mean() + 0.5
    assert dark[~kept].all()
    page.locator(".sv-rung").last.focus()
    page.keyboard.press("Home")
    page.locator(".fv-caption").filter(has_text="scale 0, 1 x 1: 1/1 tokens").wait_for()
    assert page.locator('.sv-rung[aria-pressed="true"]').count() == 1


def test_seeds_are_locked_or_new_and_stand_in_a_grid(page: Any, toy_pipe: Pipeline) -> None:
    assert page.locator("#lock").get_attribute("aria-pressed") == "true", "the link gave a seed"
    page.locator("#count").select_option("4")
    generated(page)
    tiles = page.locator(".sv-tile")
    assert [text.split("\n")[-2] for text in tiles.all_inner_texts()] == ["7", "8", "9", "10"]
    tiles.nth(2).click()
    assert "seed 9" in page.locator("#which").inner_text()
    assert np.array_equal(pixels(page, ".fv-picture"), stack_uint8(toy_pipe("penguin", seed=9, budget=0.5).images)[0])
    assert "PSNR" not in figures(page)
    page.locator("#figures .sv-button").click()
    page.locator("#figures dt").filter(has_text="PSNR").wait_for()
    page.locator("#lock").click()
    page.locator("#count").select_option("1")
    generated(page)
    assert "seed 7" not in page.locator("#which").inner_text()


def test_less_compute_is_tried_and_plotted(page: Any) -> None:
    generated(page)
    page.locator("#tried-text button").click()
    page.locator("#tried .fv-point").nth(5).wait_for()
    says(page, "Done")
    page.locator('#tried [aria-label^="share 30 %"] .fv-target').click()
    assert "share 30 %" in page.locator("#which").inner_text()
    assert figures(page)["FLOPs"][:2] in ("29", "30"), "a share is met within 2 %"
    assert page.locator(".sv-pastone").count() == 6, "the full run is no image that somebody asked for"


def test_the_history_outlives_the_page_and_can_be_deleted(page: Any) -> None:
    generated(page)
    before = pixels(page, ".fv-picture")
    page.reload()
    page.locator(".sv-pastone").click()
    says(page, "Done")
    assert np.array_equal(pixels(page, ".fv-picture"), before)
    assert "dB" in figures(page)["PSNR"], "with its reference"
    page.locator("#prompt").fill("cactus")
    generated(page)
    page.locator(".sv-delete").first.focus()
    page.keyboard.press("Enter")
    page.locator("#empty").wait_for()
    assert page.locator(".sv-pastone").count() == 1
    page.locator("#forget").click()
    page.locator("#past-card").wait_for(state="hidden")
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator(".sv-pastone").count() == 0


def test_an_image_can_be_had_again(page: Any, live: Live, tmp_path: Path, toy_pipe: Pipeline) -> None:
    generated(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "penguin-7.png"
    download.value.save_as(tmp_path / "image.png")
    config = read_image_config(tmp_path / "image.png")
    assert (config["prompt"], config["seed"]) == ("penguin", 7)
    page.locator('[data-copy="command"]').click()
    command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert command[:2] == ["foveate", "generate"]
    policy = command[command.index("--policy") + 1]
    again = toy_pipe("penguin", seed=7, policy=policy).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(tmp_path / "image.png").convert("RGB")))
    if shutil.which("curl"):
        ran = subprocess.run(shlex.split(page.locator("#curl").inner_text()), capture_output=True, check=True)
        assert json.loads(ran.stdout)["foveate"]["images"][0]["seed"] == 7
    page.locator("#link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#prompt").input_value() == "penguin"
    assert page.locator('.sv-level input[value="share"]').is_checked()
    assert (page.locator("#share").input_value(), page.locator("#seed").input_value()) == ("50", "7")


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("hamburger")
    page.keyboard.press("Enter")
    says(page, "Done")
    page.locator(".sv-level input:checked").focus()
    page.keyboard.press("ArrowLeft")
    assert not page.locator('.sv-level input[value="share"]').is_checked()
    page.locator("#share").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#share-text").inner_text() == "55 %"
    assert page.locator('.sv-level input[value="share"]').is_checked(), "the slider chooses its level"


def test_what_the_form_can_see_is_not_sent(page: Any) -> None:
    page.locator("#prompt").fill("  ")
    page.locator("#go").click()
    assert page.locator("#prompt-error").inner_text() == "Write what the image shows."
    assert page.locator("#prompt").get_attribute("aria-invalid") == "true"
    page.locator("#prompt").fill("cat")
    assert page.locator("#prompt-error").inner_text() == ""
    page.locator("#seed").fill("-3")
    page.locator("#go").click()
    assert page.evaluate("document.activeElement.id") == "seed"


def test_a_refusal_leads_to_its_field(browser: Any, live: Live) -> None:
    with visited(browser, f"{live.url}/{SHARE}", expects=[STATUS + "400"], **DESKTOP) as page:
        choose(page, "own")
        page.locator("#own").fill("no-such-policy")
        page.locator("#go").click()
        page.locator("#notice").wait_for()
        assert "no-such-policy" in page.locator("#own-error").inner_text()
        assert page.evaluate("document.activeElement.id") == "own"
        assert page.locator("#notice button").count() == 0, "trying the same again helps nothing"
        page.locator("#own").fill("drop-branch:count=1")
        generated(page)
        assert page.locator("#notice").is_hidden()


def test_a_wait_is_counted_down(browser: Any, start: Callable[..., Live]) -> None:
    live = start(limits=Limits(requests_per_minute=0.5))
    with visited(browser, f"{live.url}/{FULL}", expects=[STATUS + "429"], **DESKTOP) as page:
        generated(page)
        page.locator("#go").click()
        page.locator("#notice-text").filter(has_text="The server is busy").wait_for()
        button = page.locator("#notice button")
        assert re.fullmatch(r"Try again in \d+ s", button.inner_text())
        assert button.is_disabled()


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Any, start: Callable[..., Live]) -> None:
    live = start(keys=Keys(environment="a-key-of-sixteen-letters"))
    options = {"expects": [STATUS + "401"], "is_ready": False, **DESKTOP}
    with visited(browser, f"{live.url}/{FULL}", **options) as page:
        for given in ("wrong-key", "a-key-of-sixteen-letters"):
            page.locator("#key-dialog").wait_for()
            page.locator("#key").fill(given)
            page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]", state="attached")
        generated(page)
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.locator("#key-dialog").is_hidden()
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert "a-key-of" not in page.locator("#curl").inner_text()


def test_a_server_that_loads_says_so_and_is_asked_again(
    browser: Any, start: Callable[..., Live], toy_pipe: Pipeline
) -> None:
    live = start(is_loaded=False)
    with visited(browser, live.url, expects=[STATUS + "503"], is_ready=False, **DESKTOP) as page:
        page.locator("#notice-text").filter(has_text="The server is not ready").wait_for()
        assert "Try again" in page.locator("#notice button").inner_text()
        live.service.open(toy_pipe, live.scheduler)
        page.wait_for_selector("html[data-ready]", state="attached")
        page.locator("#notice").wait_for(state="hidden")
        assert page.locator("#model").inner_text() == "emoji-tiny"


def test_no_network_and_a_stop_are_told(browser: Any, live: Live) -> None:
    with visited(browser, f"{live.url}/{FULL}", expects=["ERR_INTERNET_DISCONNECTED"], **DESKTOP) as page:
        page.context.set_offline(True)
        page.locator("#go").click()
        page.locator("#notice-text").filter(has_text="No answer").wait_for()
        page.context.set_offline(False)
        page.locator("#notice button").click()
        says(page, "Done")
        page.locator("#size").select_option("1024x1024")
        page.locator("#go").click()
        page.locator(".sv-rung.sv-filled").nth(1).wait_for()
        page.locator("#stop").click()
        page.locator("#notice-text").filter(has_text="Stopped").wait_for()
        assert page.locator("#stop").is_hidden()


def test_a_deadline_gives_a_coarse_image_or_an_error(browser: Any, live: Live) -> None:
    with visited(browser, f"{live.url}/{FULL}", **DESKTOP) as page:
        page.locator(".sv-more summary").click()
        page.locator("#deadline").fill("400")
        page.locator("#compares").uncheck()
        page.locator("#size").select_option("1024x1024")
        page.locator("#go").click()
        says(page, "The deadline passed: this is the image after")
        assert page.locator("#warnings").is_visible()
        page.locator("#late").select_option("error")
        page.locator("#go").click()
        page.locator("#notice-text").filter(has_text="Not done in time").wait_for()


def test_the_queue_is_shown(browser: Any, live: Live) -> None:
    with visited(browser, f"{live.url}/{FULL}", **DESKTOP) as page:
        others = [HTTPConnection("127.0.0.1", live.port) for _ in range(2)]
        for other in others:
            other.request("POST", PATH, json.dumps(LARGE), {"Content-Type": "application/json"})
        page.locator("#compares").uncheck()
        page.locator("#go").click()
        says(page, "before this one")
        page.locator("#stop").click()
        page.locator("#notice-text").filter(has_text="Stopped").wait_for()
        for other in others:
            other.close()


def test_a_phone_scrolls_only_down(browser: Any, live: Live) -> None:
    with visited(browser, f"{live.url}/{SHARE}", **PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#go").tap()
        page.locator("foveate-view").wait_for()
        assert page.evaluate("document.getElementById('stage').getBoundingClientRect().top") < 500, (
            "it comes into sight"
        )
        says(page, "Done")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        small = page.evaluate(
            "[...document.querySelectorAll('main button, main select, .sv-level')]"
            ".filter((one) => one.offsetParent && !one.matches('.sv-delete'))"
            ".map((one) => one.getBoundingClientRect().height)"
        )
        assert min(small) >= 32, "large enough for a finger"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_rule_is_violated(browser: Any, live: Live, axe: str, device: dict[str, Any], scheme: str) -> None:  # noqa: F811
    with visited(browser, f"{live.url}/{SHARE}", color_scheme=scheme, reduced_motion="reduce", **device) as page:
        page.evaluate(axe)
        assert violations(page) == []
        page.locator(".sv-more summary").click()
        page.locator("#count").select_option("4" if device is DESKTOP else "1")
        page.locator("#go").click()
        page.locator(".sv-rung.sv-filled").first.wait_for()
        assert violations(page) == []
        says(page, "Done")
        for name in ("slider", "side", "difference", "compute"):
            view(page, name)
            assert violations(page) == []
        page.locator("#prompt").fill("")
        page.locator("#go").click()
        assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_theme_is_chosen_and_remembered(browser: Any, live: Live, scheme: str) -> None:
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    with visited(browser, live.url, color_scheme=scheme, **DESKTOP) as page:
        before = sum(page.evaluate(brightness))
        page.locator("#theme").click()
        after = sum(page.evaluate(brightness))
        page.reload()
        assert sum(page.evaluate(brightness)) == after
    assert (before > after) == (scheme == "light")
