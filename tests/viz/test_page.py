"""The page as a file: nothing from outside, text that stays text, numbers that are none, and a size that is kept."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.viz.metrics import METRICS, metric
from foveate.viz.page import SCRIPTS, asset, bundle, render
from foveate.viz.page_data import Figure, FrontierPoint, ImagePair, Lead, PageData, Table
from foveate.viz.page_images import data_uri, store, worst_first
from tests.viz.pages import CONTROL, DEPTH, HOSTILE, OURS, PROMPTS, led_page, page, pairs, picture


class Reader(HTMLParser):
    """Elements with their attributes, and the text inside script, style and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)
        self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open[-1:]:
            self.text[tag][-1] += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(led_page())


@pytest.fixture(scope="module")
def read(html: str) -> Reader:
    return Reader(html)


@pytest.fixture(scope="module")
def content(read: Reader) -> dict[str, Any]:
    return json.loads(read.text["script"][0])


def test_nothing_comes_from_outside_and_nothing_is_inline_but_by_hash(html: str, read: Reader) -> None:
    for tag, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for t, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for text in (read.text["style"][0], read.text["script"][1]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "url(" not in read.text["style"][0]


def test_text_stays_text(html: str, read: Reader, content: dict[str, Any]) -> None:
    assert html.count("</script>") == 2, "the data and the program"
    assert "<img" not in html
    assert {pair["prompt"] for pair in content["pairs"]} == set(PROMPTS)
    assert json.loads(read.text["pre"][-1])["prompt"] == HOSTILE


def test_numbers_that_are_none_are_not_available(content: dict[str, Any], read: Reader) -> None:
    depth = next(point for point in content["points"] if point["name"] == DEPTH)
    assert depth["figures"]["psnr.mean"] == [None, None, None, "n/a", ""]
    assert all(pair["figures"]["ssim"] == [None, "n/a"] for pair in content["pairs"] if pair["policy"] == CONTROL)
    cells = [text for text in read.text["td"] if text.strip()]
    assert cells.count("n/a") >= 6
    assert not re.search(r"\b(nan|inf|null|None)\b", " ".join(cells))


def test_figures_have_units_and_intervals(content: dict[str, Any]) -> None:
    ours = next(point for point in content["points"] if point["name"] == OURS)["figures"]
    assert ours["speedup.transformer"][3:] == ["1.70x", "1.65\u20131.75x"]
    assert ours["text_match.mean"][3:] == ["60.0 %", "50.0\u201370.0 %"]
    assert ours["flops_ratio"][3:] == ["58.8 %", ""]
    assert ours["home_made"][3] == "1.235", "four significant digits"
    assert [one["name"] for one in content["metrics"]][-1] == "home_made"


def test_equal_images_are_stored_once_and_pixels_are_kept(content: dict[str, Any]) -> None:
    first = content["pairs"][0]
    assert len(content["images"]) == 3 + 9 - 1 + 1, "references, pictures but the identical one, one FLIP map"
    uri = content["images"][first["picture"]]
    stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    given = next(p for p in pairs() if (p.policy, p.prompt) == (first["policy"], first["prompt"]))
    assert (stored == given.picture).all()


def test_the_worst_pair_of_every_policy_comes_first_and_unmeasured_ones_before_it() -> None:
    given = pairs()
    order = [(pair.policy, pair.prompt) for pair in worst_first(given)]
    assert order[:3] == [(OURS, PROMPTS[2]), (DEPTH, PROMPTS[2]), (CONTROL, PROMPTS[2])]
    assert order[-2] == (DEPTH, PROMPTS[0]), "identical"
    unmeasured = replace(pairs()[0], figures={"psnr": None})
    assert worst_first([*pairs()[1:3], unmeasured])[0] is unmeasured


def test_what_others_made_of_the_worst_prompts_comes_before_the_rest() -> None:
    def made(policy: str, number: int, psnr: float) -> ImagePair:
        return replace(pairs()[0], policy=policy, prompt=f"{number:02}", figures={"psnr": psnr})

    given = [made(OURS, i, i) for i in range(20)] + [made(CONTROL, i, 40 - i) for i in range(20)]
    order = [(pair.policy, pair.prompt) for pair in worst_first(given)]
    assert order[:4] == [(OURS, "00"), (CONTROL, "19"), (OURS, "01"), (CONTROL, "18")]
    assert {prompt for _, prompt in order[16:32]} == {f"{i:02}" for i in (*range(8), *range(12, 20))}
    assert len(order) == 40


def test_a_page_beyond_its_size_keeps_the_worst_and_says_so() -> None:
    limit = 4 * len(data_uri(picture(1), is_lossless=True))
    kept = store(pairs(), limit)
    assert 1 <= len(kept.pairs) < 5
    assert sum(map(len, kept.uris)) <= limit
    assert kept.pairs[0].pair.prompt == PROMPTS[2]
    assert max(max(one.reference, one.picture, one.flip or 0) for one in kept.pairs) == len(kept.uris) - 1
    assert f"the worst {len(kept.pairs)} of 9 pairs" in render(page(), max_bytes=limit)
    assert "of 9 pairs" not in render(page())
    assert len(store(pairs(), 1).pairs) == 1, "never without an image"


def test_what_ran_is_packed_one_byte_a_token(content: dict[str, Any]) -> None:
    full, part, skipped = content["pairs"][0]["scales"]
    assert (full["depth"], skipped["depth"]) == (3, None)
    assert list(base64.b64decode(part["depth"])) == [4, 0, 1, 3, 4, 4, 0, 0, 2, 3, 4, 4, 4, 4, 4, 4]
    assert part["caption"] == "13/16 tokens, 67 % of blocks, one branch"


def test_parts_without_data_are_left_out() -> None:
    bare = PageData(title="t", summary="", points=(FrontierPoint(name="full", figures={}),), command="c", config={})
    read = Reader(render(bare))
    names = {attributes.get("id") for tag, attributes in read.elements if tag == "section"}
    assert names == {"figures", "policies", "again"}
    assert Reader(render(led_page())).elements[0][0] == "html"


def test_a_lead_stands_first(read: Reader) -> None:
    sections = [attributes["id"] for tag, attributes in read.elements if tag == "section"]
    assert sections == ["lead", "figures", "frontier", "images", "time", "policies", "again"]
    assert "Tuning <now>" in read.text["h2"][0]
    assert "policy: fovea\nshare: 0.3\n" in read.text["pre"]


def test_data_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(FoveateError, match="no point is named 'nobody'"):
        replace(page(), headline="nobody")
    with pytest.raises(FoveateError, match="different names"):
        replace(page(), points=(*page().points, page().points[0]))
    with pytest.raises(FoveateError, match="at least one point"):
        replace(page(), points=(), pairs=(), scale_times=(), headline=None)
    with pytest.raises(FoveateError, match="2 cells, got 1"):
        Table(caption="", columns=("a", "b"), rows=(("x",),))


@pytest.mark.parametrize(("name", "value"), [("one size", picture(1, 24)), ("FLIP map", np.zeros((2, 2)))])
def test_sizes_that_differ_are_refused(name: str, value: np.ndarray) -> None:
    pair = pairs()[0]
    # Past the shape checks of the tests, which users do not have.
    object.__setattr__(pair, "reference" if value.ndim == 3 else "flip", value)
    with pytest.raises(FoveateError, match=name):
        pair.__post_init__()


def test_metrics_print_what_they_are_given() -> None:
    assert metric("psnr.p10").print(31.26) == "31.3 dB"
    assert metric("anything").print(float("inf")) == "n/a"
    assert METRICS["text_match.mean"].print_interval(0.5, None) == ""
    assert Figure(value=None) == Figure(value=None, low=None, high=None)
    assert METRICS["flip.mean"].is_high_good is False


def test_scripts_become_one_module() -> None:
    text = bundle()
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", text, re.MULTILINE)
    assert len(names) > 30
    assert len(names) == len(set(names)), "one scope: a name of two files would be declared twice"
    for name in SCRIPTS:
        for other in re.findall(r'^import .* from "\./(.+)";', asset(name), re.MULTILINE):
            assert SCRIPTS.index(other) < SCRIPTS.index(name)
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|fetch\(|XMLHttpRequest|\.style\s*="
    assert not re.search(forbidden, re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_scripts_are_valid(tmp_path) -> None:
    path = tmp_path / "page.mjs"
    path.write_text(bundle(), encoding="utf-8")
    ran = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_lead_may_be_text_alone() -> None:
    text = render(replace(page(), lead=Lead(heading="Sweep", text="Nothing ran.")))
    assert "Nothing ran." in text


def test_a_pair_needs_no_extras() -> None:
    plain = ImagePair(policy=OURS, prompt="p", seed=0, reference=picture(1), picture=picture(2), figures={})
    text = Reader(render(replace(page(), pairs=(plain,)))).text["script"][0]
    assert json.loads(text)["pairs"][0]["scales"] == []
