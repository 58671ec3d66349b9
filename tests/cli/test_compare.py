"""`foveate compare`: its JSON, its page, its bounds and what it refuses."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.study import BUILT_IN_CLASSES, BUILT_IN_PROMPTS
from foveate.conditioning.label import class_index
from foveate.core.errors import FoveateError
from foveate.eval.bounds import FIGURES, WITH_INTERVAL
from foveate.eval.compare import compare
from foveate.families.published import PUBLISHED
from foveate.pipeline.pipeline import Pipeline
from tests.pipeline.test_precision import SMALL


def test_json_page_and_bounds(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\n\ntwo dogs\n")
    ran = run(
        "compare", "-p", "skip-scales:count=1", "--prompts", "p.txt", "--seeds", 2, "--runs", 1, "-m", toy_folder,
        "--html", "r/report.html", "--fail-if", "flops_ratio < 0.9", "--fail-if", "psnr.mean < 1", "--json",
    )  # fmt: skip
    data = ran.data
    assert ran.code == 1
    assert ran.err.startswith("foveate: warning: flops_ratio < 0.9 holds: flops_ratio is 0.")
    assert ran.err.count("\n") == 1
    assert {"schema_version", "n", "psnr", "ssim", "identical", "yardstick_psnr", "speedup", "flops_ratio"} <= set(data)
    assert set(data["speedup"]) == {"transformer", "decoder", "end_to_end"}
    assert data["n"] == 4
    assert "two dogs" in (tmp_path / "r" / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt", "r"]


def test_table_for_people(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\n")
    ran = run(
        "compare", "-p", "full", "--prompts", "p.txt", "--runs", 1, "-m", toy_folder, "--fail-if", "psnr.min < 99"
    )
    assert (ran.code, ran.err) == (0, "")
    assert "1 of 1" in ran.out


def test_size_and_sampling_hold_for_both_sides(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\n")
    data = run(
        "compare", "-p", "skip-scales", "--prompts", "p.txt", "--runs", 1, "-m", toy_folder, "--json", "--size",
        "0.06M", "--aspect-ratio", "3:2", "--cfg", 1, "--tau", "0.7", "--top-k", 1, "--top-p", "0.9",
        "--negative-prompt", "a dog",
    ).data  # fmt: skip
    config = data["config"]
    assert config["width"] > config["height"]
    found = [set(config[name]) for name in ("guidance_scale", "temperature", "top_k", "top_p")]
    assert found == [{1.0}, {0.7}, {1}, {0.9}]
    assert config["negative_prompts"] == ["a dog"]
    assert data["yardstick_psnr"] == 100, "the likeliest value is the same for every seed"


def test_what_a_comparison_sets_is_not_an_option(toy_pipe: Pipeline) -> None:
    with pytest.raises(FoveateError, match="a comparison sets policy, seed itself; leave it out of options"):
        compare(toy_pipe, "full", ["a cat"], options={"seed": 1, "policy": "full"})


@pytest.mark.soak
def test_a_model_of_classes_draws_classes(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "var-d16", replace(PUBLISHED["var-d16"], spec=SMALL["var"]))
    monkeypatch.setattr("foveate.cli.study_run.BUILT_IN_CLASSES", BUILT_IN_CLASSES[:2])
    ran = run("compare", "-p", "skip-scales", "-m", "var-d16", "--weights", "random", "--runs", 1, "--json")
    assert ran.code == 0, ran.err
    assert [row["prompt"] for row in ran.data["images"]] == list(BUILT_IN_CLASSES[:2])
    assert len({class_index(name) for name in BUILT_IN_CLASSES}) == 16


@pytest.mark.parametrize("command", ["compare", "sweep", "tune"])
def test_help_names_every_figure_and_exit_code(run: Callable[..., Any], command: str) -> None:
    text = run(command, "--help").out.partition("Figures of bounds:")[2]
    figures, _, codes = text.partition("Exit codes:")
    listed = figures.partition("Those of images")[0]
    named = set(re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", listed)) - {"each", "also", "with", "and", "behind", "it"}
    spreads = {f"speedup.{part}.{end}" for part in ("transformer", "decoder", "end_to_end") for end in ("p10", "p90")}
    assert (named - {"p10", "p90"}) | spreads == set(FIGURES)
    assert re.findall(r"\d+", codes) == ["0", "1", "2", "130", "143"]


def test_every_figure_can_be_bounded(toy_pipe: Pipeline, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.eval.controls.CONTROLS", ("skip-scales",))
    report = compare(toy_pipe, "full", ["a cat", "a dog"], runs=1, controls=True)
    assert set(FIGURES) <= set(report.figures())
    ends = {f"{name}{end}" for name in WITH_INTERVAL for end in (".low", ".high")}
    assert set(report.figures()) == set(FIGURES) | ends
    assert all(report.check(f"{name} >= -1e9") for name in (*FIGURES, *ends))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--policy"]),
        (["-p", "ful"], ["did you mean full"]),
        (["-p", "full", "--against", "ful"], ["did you mean full"]),
        (["-p", "full", "--prompts", "none.txt"], ["cannot read prompts from none.txt"]),
        (["-p", "full", "--seeds", "0"], ["--seeds must be 1 or more"]),
        (["-p", "full", "--fail-if", "ssim is low"], ["a bound is written like"]),
        (["-p", "full", "--fail-if", "beauty < 1"], ["no figure 'beauty'"]),
        (["-p", "full", "--html", "."], ["--html must be a file, . is a folder"]),
        (["-p", "full", "--csv", "a", "--html", "a"], ["--html and --csv name the same file"]),
        (["-p", "full", "--fail-if", "depthvar psnr.mean < 1"], ["depthvar is not compared; there are full"]),
        (["-p", "full", "--fail-if", "beats_controls_by_db < 1"], ["there are no controls; add --controls"]),
        (["-p", "full", "--judge", "none"], ["no judge 'none'", "or name one as module:name"]),
        (["-p", "full", "--judge", "foveate.eval.judges:GROUP"], ["cannot"]),
    ],
)
def test_refusals(run: Callable[..., Any], tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    run("compare", *arguments).assert_refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_built_in_prompts_are_distinct_labels_that_were_trained_on() -> None:
    assert len(set(BUILT_IN_PROMPTS)) == len(BUILT_IN_PROMPTS) == 16
    folder = Path(__file__).parents[2] / "benchmarks"
    labels, prompts, forty = (
        set((folder / f"{name}.txt").read_text(encoding="utf-8").splitlines())
        for name in ("labels", "prompts", "forty")
    )
    assert set(BUILT_IN_PROMPTS) <= labels & (prompts | forty)
