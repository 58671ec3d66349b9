"""`foveate bench`: its JSON, files and table, what a stop leaves, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.cli.bench import sizes_of
from foveate.cli.options import SizeOptions
from foveate.pipeline.pipeline import Pipeline

QUICK = ("--policy", "skip-scales:count=5", "--policy", "skip-scales:count=4|drop-branch:count=1", "--quiet")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the peak and the bandwidth on small matrices."""
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))
    monkeypatch.setattr("foveate.bench.peak.BANDWIDTH_SIZE", 64)


def test_latency_as_json_and_files(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    ran = run(
        "bench", "latency", "-m", toy_folder, *QUICK, "--size", "256x256", "--runs", 2, "--json", "--output", "out"
    )
    assert (ran.code, ran.err) == (0, "")
    data = ran.data
    assert data["schema_version"] == 1
    assert list(data["cases"][0]["policies"][1]["ms"]) == ["text", "transformer", "refiner", "decoder", "total", "rest"]
    assert data["cases"][0]["policies"][1]["efficiency"]["median"] > 0
    assert data["command"].split()[0] == "foveate"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["bench.csv", "bench.json", "bench.md", "bench.svg"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_throughput_for_people(run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("bench", "throughput", "-m", toy_folder, *QUICK, "--batch", "1,2", "--runs", 1, "--warmup", 0)
    assert (ran.code, ran.err) == (0, "")
    for part in ("images/s", "batch 2", "p99 needs 100", "matmul peak", "no warm-up round"):
        assert part in ran.out


def test_memory(run: Callable[..., Any], toy_folder: Path) -> None:
    data = run("bench", "memory", "-m", toy_folder, *QUICK, "--runs", 1, "--json").data
    assert data["weights_bytes"]["transformer"] > 0
    assert data["cases"][0]["policies"][0]["bytes"]["kv"]["median"] > 0
    assert any("VmHWM" in line or "only weights" in line for line in data["method"])


def test_calibrate_writes_a_profile_that_generate_reads(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path / "profiles"))
    ran = run("bench", "calibrate", "-m", toy_folder, "--runs", 1, "-o", "here", "-q")
    assert (ran.code, ran.err) == (0, "")
    (stored,) = (tmp_path / "profiles").iterdir()
    assert ran.out.splitlines()[-2:] == [str(stored), "here/profile.json"]
    data = json.loads((tmp_path / "here" / "profile.json").read_text())
    assert (data["format"], data["settings"]["policies"][0]) == (2, "full")
    assert json.loads(stored.read_text())["fit"] == data["fit"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["profile.json"]
    call = ("generate", "a cat", "-m", toy_folder, "--seed", 1, "-q", "--latency-budget-ms")
    assert run(*call, 1e7, "--json").data["latency"]["is_met"]
    late = run(*call, 0.01, "--policy", "random-tokens:num_scales=2")
    assert re.search(r"latency budget +0.01 ms, missed by \d+ ms", late.out)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (torch.OutOfMemoryError("no"), 2)])
def test_a_stop_still_prints_what_was_measured(
    run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    generate, made = Pipeline.__call__, []

    def fail(self: Pipeline, prompts: Any, **options: Any) -> Any:
        made.append(prompts)
        if len(made) > 3:
            raise error
        return generate(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "__call__", fail)
    ran = run("bench", "latency", "-m", toy_folder, *QUICK, "--warmup", 0, "--runs", 5, "--json")
    assert ran.code == code
    assert (ran.data["cases"][0]["rounds"], ran.data["stopped"]) == (1, ran.data["stopped"])
    assert "after 1 of 5 rounds" in ran.err
    assert ran.err.count("\n") == 1


def test_nothing_measured(run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pipeline, prompts: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "__call__", fail)
    ran = run("bench", "latency", "-m", toy_folder, *QUICK)
    assert (ran.code, ran.out, ran.err) == (130, "", "foveate: interrupted\n")


def test_sizes() -> None:
    assert sizes_of(None, None) == [SizeOptions()]
    budget, pixels = sizes_of(["0.06m", "256X128"], None)
    assert (budget.pixels, budget.width_and_height()) == ("0.06M", None)
    assert (pixels.pixels, pixels.width_and_height()) == (None, (256, 128))
    ratios = [SizeOptions(size="1M", aspect_ratio=ratio) for ratio in ("1:1", "4:3")]
    assert sizes_of(["1M"], ["1:1", "4:3"]) == ratios
    assert sizes_of(None, ["2:1"]) == [SizeOptions(aspect_ratio="2:1")]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["speed"], ["latency", "calibrate"]),
        (["latency", "--size", "3M"], ["--size must be one of 0.06M", "WIDTHxHEIGHT", "'3M'"]),
        (["latency", "--size", "100x100"], ["size must be one of", "256x256"]),
        (["latency", "--size", "256x256", "--aspect-ratio", "1:1"], ["leave out --aspect-ratio"]),
        (["latency", "--aspect-ratio", "9:1"], ["aspect ratio must be one of"]),
        (["latency", "--batch", "0"], ["--batch must be 1 or more"]),
        (["latency", "--batch", "many"], ["--batch must be a whole number"]),
        (["latency", "--runs", "0"], ["--runs must be 1 or more"]),
        (["latency", "--warmup", "-1"], ["--warmup must be 0 or more"]),
        (["latency", "--seed", "-1"], ["--seed must be 0 or more"]),
        (["latency", "--policy", "ful"], ["did you mean full"]),
        (["latency", "--policy", "skip-scales:count=9"], ["count must be less than"]),
        (["latency", "--prompts", "none.txt"], ["cannot read prompts from none.txt"]),
        (["latency", "--threads", "0"], ["--threads must be 1 to 4096"]),
        (["latency", "--device", "abacus"], ["device must be"]),
        (["latency", "--output", "file"], ["--output must be a folder"]),
        (["calibrate", "--policy", "full"], ["measures policies of its own; leave out --policy"]),
    ],
)
def test_refusals(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    run("bench", *arguments, "--model", toy_folder).assert_refused(*parts)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plot_needs_an_extra_and_says_so_before_it_measures(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.cli.bench.find_spec", lambda name: None)
    monkeypatch.setattr(Pipeline, "__call__", None)
    run("bench", "latency", "-m", toy_folder, "-o", "out").assert_refused("needs matplotlib", "foveate[eval]")
    assert list(tmp_path.iterdir()) == []
