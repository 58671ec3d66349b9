"""The page's files as they are served: types, policy, nothing inline, nothing from elsewhere, nothing missing."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from starlette.testclient import TestClient

from foveate.server.app import create_app
from foveate.server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "src/foveate/server/page"
SHARED = PAGE.parents[1] / "viz/assets"
INDEX = (PAGE / "index.html").read_text(encoding="utf-8")
SCRIPTS = sorted(PAGE.glob("*.js"))
MARKUP = r"\.innerHTML|\.outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(None, None, ServerSettings())) as found:
        yield found


def imports(name: str, text: str) -> list[str]:
    """Paths from the root that a script imports; those of the shared folder import each other there."""
    folder = "page/viz/" if name.startswith("page/viz/") else "page/"
    return [folder + found for found in re.findall(r'(?:from|import) "\./([^"]+)"', text)]


def reached(client: TestClient) -> dict[str, Any]:
    """Everything that a browser fetches, beginning at the page."""
    found: dict[str, Any] = {}
    waiting = re.findall(r'(?:src|href)="(page/[^"#]+)"', INDEX)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = client.get(f"/{name}")
            assert found[name].status_code == 200, name
            waiting += imports(name, found[name].text) if name.endswith(".js") else []
    return found


def test_everything_that_the_page_needs_is_served_with_its_type_under_a_strict_policy(client: TestClient) -> None:
    answers = reached(client)
    assert len(answers) > 20
    for name, answer in {**answers, "index.html": client.get("/")}.items():
        assert answer.headers["content-type"].partition(";")[0] == TYPES[Path(name).suffix], name
        assert answer.headers["x-content-type-options"] == "nosniff"
        rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert rules["default-src"] == "'none'"
        assert {rules[kind] for kind in ("script-src", "style-src", "connect-src", "font-src")} == {"'self'"}
    unused = {path.name for path in PAGE.iterdir()} - {name.rpartition("/")[2] for name in answers} - {"index.html"}
    assert not unused


def test_nothing_stands_inline_and_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", INDEX)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", INDEX))
    for path in [*PAGE.iterdir(), *SHARED.glob("*.js"), *SHARED.glob("*.css")]:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w://|['\"(]//", text), path
        assert not re.search(MARKUP, text), path


def test_scripts_ask_for_elements_that_there_are() -> None:
    ids = re.findall(r'\sid="([^"]+)"', INDEX)
    assert len(ids) == len(set(ids))
    asked = {name for path in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', path.read_text(encoding="utf-8"))}
    assert len(asked) > 40
    assert asked <= set(ids)
    pointed = re.findall(r'(?:\bfor|aria-labelledby|aria-describedby|\blist)="([^"]+)"', INDEX)
    assert set(pointed) <= set(ids)


def test_every_module_says_what_it_is() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(("/**", "// ")), path
        assert len(text.splitlines()) <= 400, path


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page and what it shares, as node takes modules."""
    folder = tmp_path_factory.mktemp("modules")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    shutil.copytree(SHARED, folder / "viz")
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    return folder


def ran(folder: Path, program: str, *flags: str) -> Any:
    (folder / "program.js").write_text(program, encoding="utf-8")
    done = subprocess.run(
        ["node", *flags, "program.js"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


@needs_node
def test_every_script_parses(modules: Path) -> None:
    program = r"""
    import { readFileSync, readdirSync } from "node:fs";
    import { SourceTextModule } from "node:vm";
    const names = [".", "viz"].flatMap((folder) => readdirSync(folder).map((name) => `${folder}/${name}`));
    const scripts = names.filter((name) => name.endsWith(".js"));
    for (const name of scripts) new SourceTextModule(readFileSync(name, "utf-8"), { identifier: name });
    console.log(JSON.stringify(scripts));
    """
    parsed = ran(modules, program, "--experimental-vm-modules", "--no-warnings")
    assert {f"./{path.name}" for path in SCRIPTS} <= set(parsed)


@needs_node
def test_events_are_read_however_the_bytes_are_cut(modules: Path) -> None:
    program = r"""
    import { eventsOf } from "./sse.js";
    const texts = [
      'event: a\r\ndata: {"n": 1, "t": "\u00e9\u4e2d"}\r\n\r\n: ping\r\n\r\n' +
        'data: {"n":\r\ndata: 2}\r\n\r\ndata: [DONE]\r\n\r\n',
      'data: {"n":\ndata: 3}\n\nid: 4\n\ndata:{"n": 4}\n\ndata: {"n": "unfinished"}\n',
    ];
    const found = [];
    for (const text of texts) {
      const bytes = new TextEncoder().encode(text);
      for (const size of [1, 2, 3, 7, 1000]) {
        const stream = new ReadableStream({
          start(controller) {
            for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
            controller.close();
          },
        });
        const events = [];
        for await (const event of eventsOf(stream)) events.push(event);
        found.push(events);
      }
    }
    console.log(JSON.stringify(found));
    """
    found = ran(modules, program)
    assert found[:5] == [[{"n": 1, "t": "\u00e9\u4e2d"}, {"n": 2}]] * 5
    assert found[5:] == [[{"n": 3}, {"n": 4}]] * 5


@needs_node
def test_a_choice_becomes_a_request_and_a_link(modules: Path) -> None:
    program = r"""
    import { NOTHING_CHOSEN, bodyOf, chosenBy, fullBody, hashOf, titleOf } from "./choice.js";
    const chosen = { ...NOTHING_CHOSEN, prompt: " a & b = #c ", size: "256x256", seed: 0, count: 4, temperature: "0.5",
                     negative: "blue", deadlineMs: "900" };
    const bodies = ["full", "preset:preset-draft", "share", "own"].map((level) =>
      bodyOf({ ...chosen, level, share: 45, own: " drop-branch:count=1 " }));
    const hostile = chosenBy("#prompt=%3Cimg%3E&seed=-1&share=1e9&size=x&__proto__=1&other=2");
    console.log(JSON.stringify({
      bodies, hostile, titles: bodies.map(titleOf), full: fullBody(bodies[2]),
      again: chosenBy(`#${hashOf({ ...chosen, level: "share", share: 45 })}`),
    }));
    """
    found = ran(modules, program)
    full, preset, share, own = found["bodies"]
    assert (full["policy"], preset["policy"], own["policy"]) == ("full", "preset-draft", "drop-branch:count=1")
    assert (share["budget"], "policy" in share) == (0.45, False)
    assert full["prompt"] == "a & b = #c"
    assert (full["seed"], full["n"], full["temperature"], full["negative_prompt"]) == (0, 4, 0.5, "blue")
    assert (full["latency_budget_ms"], full["on_late"], "guidance_scale" in full) == (900, "coarse", False)
    reference = found["full"]
    assert (reference["policy"], reference["n"], reference["seed"]) == ("full", 1, 0)
    assert not {"budget", "latency_budget_ms", "on_late"} & set(reference), "a reference is whole"
    assert found["titles"] == ["full run", "draft", "share 45 %", "drop-branch:count=1"]
    again = found["again"]
    assert (again["prompt"], again["level"], again["share"], again["seed"]) == (" a & b = #c ", "share", 45, 0)
    assert again["isLocked"] is True
    assert found["hostile"] == {"prompt": "<img>", "size": "x"}


@needs_node
def test_a_run_is_what_its_events_say(modules: Path) -> None:
    program = r"""
    import { addScale, finish, newRun, printMs, printShare, transformerMs } from "./run.js";
    const body = { prompt: "p", size: "auto", seed: 3, policy: "fovea" };
    const run = newRun({ model: "m", body, title: "t" });
    const scale = (index, depth, tokens) => ({ scale: index, num_scales: 3, grid: [2, 2], ms: 10, company: 1 + index,
      tokens, flops: { run: 1, full: 2 }, b64_json: btoa("jpg"),
      depth: { b64: btoa(String.fromCharCode(...depth)), num_blocks: 4 } });
    addScale(run, scale(0, [4, 0, 2, 4], { run: 3, full: 4 }));
    addScale(run, scale(1, [0, 0, 0, 0], { run: 0, full: 4 }));
    const foveate = { seed: 3, policy: { spec: "fovea" }, ms: { queue: 1 }, flops: { run: 1, full: 2 },
      tokens: { run: 3, full: 8 }, warnings: [], is_coarse: false, command: "c", curl: "u" };
    finish(run, { b64_json: btoa("png"), output_format: "png", size: "8x8", foveate });
    const cut = newRun({ model: "m", body: { ...body, policy: "full" }, title: "t" });
    const coarse = { ...foveate, policy: { spec: "full" }, is_coarse: true };
    finish(cut, { b64_json: btoa("png"), output_format: "png", size: "8x8", foveate: coarse });
    const other = newRun({ model: "m", body: { ...body, policy: "full" }, title: "t" });
    const foreign = newRun({ model: "m", body: { ...body, seed: 4 }, title: "t" });
    console.log(JSON.stringify({
      depths: run.scales.map((one) => one.depth && [...one.depth]), captions: run.scales.map((one) => one.caption),
      size: run.size, ms: transformerMs(run), bytes: await run.picture.text(), kind: run.picture.type,
      isFull: [run.isFull, other.isFull, cut.isFull], keys: [run.key === other.key, run.key === foreign.key],
      printed: [printMs(3.14), printMs(42.4), printMs(1234), printMs(12345), printMs(NaN), printShare(27e9, 90.9e9)],
    }));
    """
    found = ran(modules, program)
    assert found["depths"] == [[4, -1, 2, 4], None]
    assert found["captions"][0] == "3/4 tokens, 63 % of blocks, 10 ms"
    assert found["captions"][1].startswith("did not run")
    assert (found["size"], found["ms"], found["bytes"], found["kind"]) == ("8x8", 20, "png", "image/png")
    assert found["isFull"] == [False, True, False], "what a deadline cut is no reference"
    assert found["keys"] == [True, False], "the reference is that of the same seed"
    assert found["printed"] == ["3.1 ms", "42 ms", "1.23 s", "12.3 s", "n/a", "27.0 of 90.9 GFLOPs"]


@needs_node
def test_every_failure_has_its_words(modules: Path) -> None:
    program = r"""
    import { ApiError, GoneError } from "./api.js";
    import { said } from "./words.js";
    const run = { scales: [1, 2], numScales: 7 };
    const api = (status, more = {}) => said(new ApiError({ status, message: "what the server says", ...more }), run);
    console.log(JSON.stringify({
      busy: api(429, { waitS: 7 }), loading: api(503, { waitS: 5 }), closing: api(null, { code: "closing" }),
      late: api(null, { code: "late" }), refused: api(400, { param: "size" }), own: api(400, { param: "policy" }),
      broken: api(500), gone: said(new GoneError(false)), cut: said(new GoneError(true), run),
      stopped: said(new DOMException("x", "AbortError"), run), bug: said(new RangeError("oops")),
    }));
    """
    found = ran(modules, program)
    titles = {name: notice["title"] for name, notice in found.items()}
    assert titles["busy"] == "The server is busy"
    assert titles["loading"] == titles["closing"] == "The server is not ready"
    assert (titles["late"], titles["broken"]) == ("Not done in time", "The server failed")
    assert (titles["gone"], titles["cut"], titles["stopped"]) == ("No answer", "The connection broke", "Stopped")
    assert (found["busy"]["waitS"], found["loading"]["waitS"]) == (7, 5)
    assert found["refused"] == {
        "title": "The request was refused", "text": "What the server says.", "waitS": None, "canRetry": False,
        "field": "size",
    }  # fmt: skip
    assert found["own"]["field"] == "own"
    assert "2 of 7 scales had come" in found["cut"]["text"]
    assert "RangeError: oops" in found["bug"]["text"]
