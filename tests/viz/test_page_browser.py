"""The page in a real browser, offline: clicks, keys, a phone, both colour schemes."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.viz.page import asset, render
from foveate.viz.page_images import data_uri
from tests.viz.browser import DESKTOP, PHONE, chromium, opened
from tests.viz.pages import CONTROL, DEPTH, FULL, HOSTILE, OURS, PROMPTS, led_page, pairs, picture

pytestmark = pytest.mark.soak
VIEWS = ("slider", "side", "difference", "flip", "compute")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(led_page()), encoding="utf-8")
    return file


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    with opened(browser, path, **DESKTOP) as found:
        yield found


def view(page: Any, name: str) -> None:
    """Chooses a view as a reader does, and waits until it is drawn."""
    page.locator(f'.fv-tab:has(input[value="{name}"])').click()
    page.wait_for_selector(f'foveate-view[data-view="{name}"]')
    if name in VIEWS[2:]:
        page.wait_for_selector(f'.fv-canvas[aria-label^="{name}" i]')


def says(page: Any, selector: str, text: str) -> None:
    """Waits until an element has a text."""
    page.locator(selector).filter(has_text=text).wait_for(timeout=5000)


def pixels(page: Any) -> np.ndarray:
    """What the canvas shows."""
    uri = page.locator(".fv-canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(np.int64)


def shown(page: Any) -> dict[str, Any]:
    """What the page says about the policy that is chosen."""
    return {
        "select": page.locator("#pg-policy").input_value(),
        "row": page.locator("tr.pg-now").get_attribute("data-name"),
        "filter": page.locator('[data-part="filter"]').input_value(),
        "prompt": page.locator(".pg-details h3").inner_text(),
        "tile": page.locator(".pg-tile b").first.inner_text(),
        "point": page.locator('#pg-frontier [aria-pressed="true"]').get_attribute("data-id"),
        "bars": page.locator("#pg-bars-legend").inner_text(),
    }


def test_the_worst_image_of_the_headline_is_shown_first(page: Any) -> None:
    found = shown(page)
    assert {found["select"], found["row"], found["filter"], found["point"]} == {OURS}
    assert found["prompt"] == PROMPTS[2]
    assert found["tile"] == "1.70x"
    assert [page.locator(f".fv-{side}").inner_text() for side in ("left", "right")] == [FULL, OURS]
    assert FULL in found["bars"]
    assert OURS in found["bars"]
    assert page.locator(".pg-thumb").all_inner_texts() == ["20.0 dB", "25.0 dB", "30.0 dB"]


def test_text_is_never_markup(page: Any) -> None:
    page.locator(".pg-thumb").nth(1).click()
    assert page.locator(".pg-details h3").inner_text().split() == HOSTILE.split()
    assert page.locator("img[src=x]").count() == 0


def test_a_click_on_a_point_chooses_its_policy_everywhere(page: Any) -> None:
    page.locator(f'#pg-frontier [data-id="{CONTROL}"] .fv-target').click()
    found = shown(page)
    assert {found["select"], found["row"], found["filter"], found["point"]} == {CONTROL}
    assert found["tile"] == "1.90x"
    page.locator("#pg-policy").select_option(OURS)
    assert shown(page)["point"] == OURS
    page.locator(f'[data-choose="{CONTROL}"]').click()
    assert shown(page)["select"] == CONTROL


def test_points_are_reached_with_the_keyboard_and_say_what_they_are(page: Any) -> None:
    page.locator("#pg-y").focus()
    page.keyboard.press("Tab")
    focused = "() => document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith(
        f"{OURS}: policy; speedup, transformer 1.70x (1.65\u20131.75x); PSNR, mean 32.0"
    )
    assert page.locator("#pg-frontier .fv-tip").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused).startswith(f"{CONTROL}: control")
    page.keyboard.press("Enter")
    assert shown(page)["select"] == CONTROL
    assert page.evaluate(focused).startswith(f"{CONTROL}: control"), "the focus stays where it was"


def test_axes_can_be_chosen(page: Any) -> None:
    names = page.locator("#pg-frontier .fv-axis-name")
    assert names.all_text_contents() == ["speedup, transformer, higher is better", "PSNR, mean (dB), higher is better"]
    places = (
        "() => Object.fromEntries([...document.querySelectorAll('#pg-frontier .fv-point')]"
        ".map((point) => [point.dataset.id, point.transform.baseVal[0].matrix.e]))"
    )
    by_speed = page.evaluate(places)
    assert DEPTH not in by_speed, "it has no PSNR"
    assert FULL not in by_speed, "the reference has no fidelity to itself"
    assert by_speed[OURS] < by_speed[CONTROL]
    page.locator("#pg-x").select_option("flops_ratio")
    page.locator("#pg-y").select_option("text_match.mean")
    by_flops = page.evaluate(places)
    assert by_flops[OURS] > by_flops[CONTROL]
    assert {FULL, DEPTH} <= set(by_flops)
    assert names.all_text_contents() == ["FLOPs (%), lower is better", "text match, mean (%), higher is better"]


def test_the_slider_moves_by_mouse_and_keyboard(page: Any) -> None:
    cut = "() => getComputedStyle(document.querySelector('.fv-stage')).getPropertyValue('--fv-cut')"
    page.locator(".fv-stage").scroll_into_view_if_needed()
    box = page.locator(".fv-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 40, steps=5)
    page.mouse.up()
    assert 15 <= int(page.evaluate(cut).rstrip("%")) <= 25
    before = int(page.evaluate(cut).rstrip("%"))
    page.locator(".fv-handle").focus()
    page.keyboard.press("ArrowRight")
    assert int(page.evaluate(cut).rstrip("%")) == before + 1
    assert page.locator(".fv-handle").get_attribute("aria-valuetext").startswith(f"{before + 1} % full, ")
    box = page.locator(".fv-picture").evaluate("i => getComputedStyle(i).clipPath")
    assert str(before + 1) in box


def test_views_are_radio_buttons(page: Any) -> None:
    page.locator('.fv-tab input[value="slider"]').focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("foveate-view").get_attribute("data-view") == "side"
    assert page.locator(".fv-reference").is_visible()
    assert page.locator(".fv-picture").is_visible()
    page.locator("#pg-policy").select_option(CONTROL)
    assert page.locator('.fv-tab:has(input[value="flip"])').is_hidden(), "this policy has no FLIP map"
    assert page.locator('.fv-tab:has(input[value="compute"])').is_hidden(), "nor what ran"


def test_the_difference_is_that_of_the_pixels(page: Any) -> None:
    view(page, "difference")
    pair = next(p for p in pairs() if (p.policy, p.prompt) == (OURS, PROMPTS[2]))
    difference = np.abs(pair.reference.astype(int) - pair.picture).max(-1)
    caption = page.locator(".fv-caption").inner_text()
    assert caption.startswith(f"largest difference {difference.max()} of 255; {100 * (difference > 8).mean():.1f} %")
    page.locator(".fv-gain").focus()
    page.keyboard.press("Home")
    says(page, ".fv-gain-text", "x1")
    heat = pixels(page)
    assert heat.shape == (*difference.shape, 3)
    order = np.argsort(difference, axis=None)
    least, most = heat.reshape(-1, 3)[order[0]], heat.reshape(-1, 3)[order[-1]]
    assert most.sum() > least.sum()
    page.locator("#pg-policy").select_option(DEPTH)
    page.locator(".pg-thumb").last.click()
    says(page, ".fv-caption", "equal, byte by byte")
    assert (pixels(page) == [0, 0, 4]).all()


def test_the_flip_map_is_that_of_the_pair(page: Any) -> None:
    view(page, "flip")
    assert page.locator(".fv-caption").inner_text() == "perceived difference, mean FLIP 0.50"
    heat = pixels(page).sum(-1)
    assert heat[0].mean() < heat[24].mean() < heat[-1].mean()


def test_the_compute_map_shows_what_ran_scale_by_scale(page: Any) -> None:
    view(page, "compute")
    assert page.locator(".fv-caption").inner_text() == "scale 2, 6 x 6: did not run"
    assert page.locator(".fv-none").is_visible()
    page.locator(".fv-scrub").focus()
    page.keyboard.press("ArrowLeft")
    caption = "scale 1, 4 x 4: 13/16 tokens, 67 % of blocks, one branch"
    says(page, ".fv-caption", caption)
    assert page.locator(".fv-none").is_hidden()
    found = pixels(page)
    centres = found[64::128, 64::128].sum(-1)
    depth = np.array([[3, -1, 0, 2], [3, 3, -1, -1], [1, 2, 3, 3], [3, 3, 3, 3]])
    assert centres.shape == (4, 4)
    assert centres[depth < 0].max() < 240, "tokens that did not run are dark"
    page.locator(".fv-thumb").first.click()
    says(page, ".fv-caption", "scale 0, 1 x 1: 1/1 tokens")
    page.locator(".fv-over").uncheck()
    page.locator(".fv-play").click()
    says(page, ".fv-play", "Stop")
    says(page, ".fv-caption", "scale 2, 6 x 6: did not run")
    says(page, ".fv-play", "Play")


def test_images_are_filtered_sorted_and_walked_through(page: Any) -> None:
    page.locator('[data-part="filter"]').select_option("")
    assert page.locator(".pg-thumb").count() == 9
    assert page.locator('[data-part="count"]').inner_text() == "9 pairs"
    page.locator('[data-part="sort"]').select_option(label="worst SSIM first")
    assert page.locator(".pg-thumb").all_inner_texts()[:4] == ["n/a", "n/a", "n/a", "0.900"]
    page.locator('[data-part="sort"]').select_option(label="prompt, A to Z")
    assert shown(page)["prompt"].split() == HOSTILE.split()
    page.locator(".pg-thumb").first.focus()
    page.keyboard.press("End")
    assert shown(page)["prompt"] == PROMPTS[2]
    page.keyboard.press("ArrowLeft")
    assert page.locator('.pg-thumb[aria-pressed="true"]').count() == 1
    page.locator(".pg-other").filter(has_text=DEPTH).click()
    assert page.evaluate("document.activeElement.textContent").startswith(DEPTH)
    assert page.locator(".fv-right").inner_text() == DEPTH


def test_tables_sort_and_leave_what_is_no_number_to_the_end(page: Any) -> None:
    names = page.locator("#pg-policies tbody tr")
    head = page.locator("#pg-policies th", has_text="PSNR, mean")
    head.locator("button").click()
    order = [row.get_attribute("data-name") for row in names.all()]
    assert order[:3] == [OURS, "fovea:share=0.2", "skip-scales:count=1"]
    assert set(order[-2:]) == {FULL, DEPTH}
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    assert names.first.get_attribute("data-name") == "another seed"
    assert {row.get_attribute("data-name") for row in names.all()[-2:]} == {FULL, DEPTH}
    lead = page.locator("#lead table")
    lead.locator("button", has_text="n").last.click()
    assert lead.locator("tbody tr td:last-child").all_inner_texts() == ["10", "9", "2"]


def test_what_a_command_found_stands_on_top(page: Any) -> None:
    assert page.locator("section h2").first.inner_text() == "Tuning <now>"
    assert page.locator("#pg-chart-0 .fv-point").count() == 9
    assert page.locator("#pg-chart-0 .fv-faint").count() == 3
    assert page.locator("#pg-chart-0 .fv-rule-name").text_content() == "bound 80"
    assert page.locator("#pg-chart-0 [role=button]").count() == 0, "there is nothing to choose"
    page.locator("#pg-chart-0 .fv-point").nth(1).focus()
    assert "share=1" in page.locator("#pg-chart-0 .fv-tip").inner_text()


def test_command_and_configuration_can_be_copied(page: Any) -> None:
    page.locator('[data-copy="pg-command"]').click()
    says(page, "[data-copy=pg-command]", "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == led_page().command
    page.locator('[data-copy="pg-config"]').click()
    says(page, "[data-copy=pg-config]", "Copied")
    assert json.loads(page.evaluate("navigator.clipboard.readText()"))["prompt"] == HOSTILE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_and_the_button_between_them(browser: Any, path: Path, scheme: str) -> None:
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)"
    with opened(browser, path, color_scheme=scheme, **DESKTOP) as page:
        before = sum(page.evaluate(brightness))
        page.locator("#pg-theme").click()
        after = sum(page.evaluate(brightness))
    assert (before > after) == (scheme == "light")
    assert abs(before - after) > 300


def test_a_phone_scrolls_only_down_and_its_images_answer_to_touch(browser: Any, path: Path) -> None:
    with opened(browser, path, **PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator(".fv-stage").tap(position={"x": 60, "y": 60})
        assert int(page.locator(".fv-handle").input_value()) < 35
        for name in VIEWS:
            view(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator(".pg-thumb").nth(1).tap()
        assert shown(page)["prompt"].split() == HOSTILE.split()
        small = page.evaluate(
            "[...document.querySelectorAll('.fv-tab:not([hidden]), .pg-thumb, .fv-play')]"
            ".map((one) => one.getBoundingClientRect().height)"
        )
        assert min(small) >= 32, "large enough for a finger"


def test_the_viewer_shows_an_image_while_it_forms(page: Any) -> None:
    """What the server's page does: scales come one after the other, then the finished pair."""
    image = "document.querySelector('.pg-thumb img').src"
    page.evaluate(
        "() => { const view = document.createElement('foveate-view'); view.id = 'live'; view.show({scales: []});"
        " document.querySelector('main').prepend(view); }"
    )
    for scale in range(3):
        page.evaluate(
            f"() => document.querySelector('#live').addScale({{scale: {scale}, rows: 2, columns: 2, blocks: 3, "
            f"depth: Int16Array.of(3, -1, 3, 1), caption: 'forming', image: {image}}})"
        )
    says(page, "#live .fv-caption", "scale 2, 2 x 2: forming")
    assert page.locator("#live .fv-thumb").count() == 3
    assert page.locator("#live .fv-tab:not([hidden])").all_inner_texts() == ["Compute"]
    page.evaluate(
        f"() => {{ const view = document.querySelector('#live'); view.show({{picture: {image}, reference: {image},"
        " pictureName: 'ours', referenceName: 'full'}); view.view = 'slider'; }"
    )
    assert page.locator("#live .fv-right").inner_text() == "ours"
    assert page.locator("#live .fv-picture").is_visible()


def test_the_viewer_shows_one_image_alone_and_says_which_scale_is_chosen(page: Any) -> None:
    image = "document.querySelector('.pg-thumb img').src"
    scale = "({scale, rows: 1, columns: 1, blocks: 3, depth: Int16Array.of(3), caption: 'ran'})"
    page.evaluate(
        "() => { const view = document.createElement('foveate-view'); view.id = 'live';"
        " document.querySelector('main').prepend(view); window.chosen = [];"
        " view.addEventListener('foveate-scale', (event) => window.chosen.push(event.detail));"
        f" view.show({{subject: 'a cat', picture: {image}, pictureName: 'ours',"
        f" scales: [0, 1, 2].map((scale) => {scale})}}); view.view = 'image'; }}"
    )
    assert page.locator("#live .fv-tab:not([hidden])").all_inner_texts() == ["Image", "Compute"]
    assert page.locator("#live .fv-picture").is_visible()
    assert page.locator("#live .fv-picture").get_attribute("alt") == "a cat, ours"
    page.locator('#live .fv-tab:has(input[value="compute"])').click()
    page.locator("#live .fv-thumb").first.click()
    page.locator("#live .fv-scrub").press("ArrowRight")
    assert page.evaluate("window.chosen") == [0, 1]


def test_the_viewer_works_as_modules_under_a_strict_policy(browser: Any) -> None:
    """As a server hands it out: files of their own, no inline script or style."""
    strict = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:"
    start = "import './view.js'; document.documentElement.dataset.ready = '';"
    html = "<!doctype html><link rel=stylesheet href=theme.css><link rel=stylesheet href=view.css>"
    html += "<script type=module src=start.js></script><foveate-view></foveate-view>"
    kinds = {"js": "text/javascript", "css": "text/css"}

    def answer(route: Any) -> None:
        name = route.request.url.rpartition("/")[2]
        if not name:
            route.fulfill(body=html, content_type="text/html", headers={"Content-Security-Policy": strict})
        else:
            route.fulfill(
                body=start if name == "start.js" else asset(name), content_type=kinds[name.rpartition(".")[2]]
            )

    complaints: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.route("**/*", answer)
    page.goto("http://foveate.test/")
    page.wait_for_selector("html[data-ready]", state="attached")
    one, other = (data_uri(picture(seed), is_lossless=True) for seed in (1, 2))
    page.locator("foveate-view").evaluate(
        "(view, [reference, picture]) => view.show({reference, picture, referenceName: 'full', pictureName: 'ours'})",
        [one, other],
    )
    view(page, "difference")
    most = np.abs(picture(1).astype(int) - picture(2)).max()
    says(page, ".fv-caption", f"largest difference {most} of 255")
    assert page.locator(".fv-canvas").bounding_box()["width"] > 300
    context.close()
    assert not complaints
