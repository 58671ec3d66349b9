"""`foveate bench serve`: what it refuses before a server is started, and one measurement of a server of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.bench_serve import LoadOptions as Load
from foveate.cli.bench_serve import _flags, _key
from foveate.cli.options import ModelOptions
from foveate.core.errors import FoveateError


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["latency", "--rate", "1"], ["latency puts no load on a server", "--rate"]),
        (["serve", "--rate", "0"], ["--rate must be above 0, got 0"]),
        (["serve", "--seconds", "-1"], ["--seconds must be above 0"]),
        (["serve", "--count", "0"], ["--count must be above 0"]),
        (["serve", "--goal-ms", "0"], ["--goal-ms must be above 0"]),
        (["serve", "--concurrency", "0,2"], ["--concurrency must be 1 or more, got 0"]),
        (["serve", "--concurrency", "few"], ["--concurrency must be a whole number"]),
        (["serve", "--concurrency", "1,8", "--load", "1.5"], ["give one --concurrency"]),
        (["serve", "--batch", "2"], ["serve takes no --batch", "--images"]),
        (["serve", "--size", "0.06M"], ["--size must be WIDTHxHEIGHT for serve"]),
        (["serve", "--prompts", "none.txt"], ["cannot read prompts from none.txt"]),
        (["serve", "--runs", "0"], ["--runs must be 1 or more"]),
        (["serve", "--url", "http://127.0.0.1:9", "--dtype", "bfloat16"], ["leave out the flags of the model"]),
        (["serve", "--url", "http://127.0.0.1:9"], ["answers 0 ConnectError", "is it a foveate server"]),
        (["serve", "--api-key-file", "none"], ["none: No such file"]),
    ],
)
def test_refusals(run: Callable[..., Any], arguments: list[str], parts: list[str]) -> None:
    run("bench", *arguments, "--quiet").assert_refused(*parts)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOVEATE_API_KEYS", raising=False)
    assert _key(Load()) is None
    monkeypatch.setenv("FOVEATE_API_KEYS", "sk-1, sk-2")
    assert _key(Load()) == "sk-1"
    (tmp_path / "keys").write_text("# ours\n\nsk-3\nsk-4\n")
    assert _key(Load(api_key_file=tmp_path / "keys")) == "sk-3"
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(FoveateError, match="holds no key"):
        _key(Load(api_key_file=tmp_path / "keys"))


def test_the_server_that_is_started_has_the_model_that_was_asked_for() -> None:
    model = ModelOptions(model="emoji-tiny", dtype="bfloat16", offload=True, threads=2)
    assert _flags(model) == ["--model", "emoji-tiny", "--dtype", "bfloat16", "--threads", "2", "--offload"]


@pytest.mark.soak
def test_a_server_of_its_own(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    flags = ("--concurrency", "1,2", "--seconds", 20, "--count", 6, "--warmup", 1, "--serve-flags", "--max-queue 4")
    ran = run("bench", "serve", "-m", toy_folder, *flags, "--images", 2, "--json", "--quiet", "--output", "out")
    assert (ran.code, ran.err) == (0, "")
    assert ran.data["schema_version"] == 1
    assert [side["name"] for side in ran.data["sides"]] == ["1 at a time", "2 at a time"]
    for side in ran.data["sides"]:
        (measured,) = side["rounds"]
        assert measured["requests"]["completed"] == 6
        assert measured["images_per_s"] > 0
        assert measured["server"]["restarts"] == 0
    assert ran.data["against_first"][0]["images_per_s"]["median"] > 0
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == ran.data
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "bench.svg"]
