"""`foveate compare` of several policies, `sweep` and `tune`: tables, files, bounds, and how they stop and go on."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from foveate.eval import measure

PROMPTS = "a red cat\ntwo dogs\n"


@pytest.fixture
def flags(toy_folder: Path, tmp_path: Path) -> list[object]:
    """Two prompts on the toy, timed once."""
    (tmp_path / "p.txt").write_text(PROMPTS)
    (tmp_path / "one.txt").write_text("a red cat\n")
    return ["--prompts", "p.txt", "--runs", 1, "-m", toy_folder]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C instead of a call."""
    real, made = measure._Runner.generate, []

    def generate(*arguments: Any) -> Any:
        made.append(1)
        if len(made) > count:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure._Runner, "generate", generate)


def test_several_policies_stand_in_one_table(
    run: Callable[..., Any],
    flags: list[object],
    tmp_path: Path,
    calls: list[str],
) -> None:
    ran = run(
        "compare", "-p", "skip-scales", "-p", "drop-branch", *flags, "--csv", "f.csv", "--fail-if",
        "drop-branch flops_ratio < 0.9", "--fail-if", "skip-scales identical > 0", "--store", "s",
    )  # fmt: skip
    assert ran.code == 1
    assert ran.err.startswith("foveate: warning: drop-branch flops_ratio < 0.9 holds: flops_ratio is 0.")
    assert ran.err.endswith(" for drop-branch\n")
    rows = [line.split()[0] for line in ran.out.splitlines() if line and not line.startswith(" ")]
    assert rows == ["policy", "skip-scales", "drop-branch", "full", "another", "f.csv"]
    table = list(csv.DictReader((tmp_path / "f.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["policy"] for row in table] == ["skip-scales", "drop-branch"]
    assert float(table[0]["psnr.mean.low"]) < float(table[0]["psnr.mean"]) < float(table[0]["psnr.mean.high"])
    data = run("compare", "-p", "skip-scales", "-p", "drop-branch", *flags, "--store", "s", "--json").data
    assert [entry["policy"] for entry in data["policies"]] == ["skip-scales", "drop-branch"]
    assert "psnr" not in data, "figures stand on top only where one policy is in question"
    assert data["policies"][0]["psnr"]["mean"] == pytest.approx(float(table[0]["psnr.mean"]))
    again = run("compare", "-p", "skip-scales", *flags, "--store", "s", "--seed", 4)
    again.assert_refused("first_seed was 0, is 4. Take another store, or the same settings")


def test_ctrl_c_prints_what_is_complete_and_the_same_command_goes_on(
    run: Callable[..., Any],
    flags: list[object],
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("compare", "-p", "skip-scales", *flags, "--json", "--store", "s")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2 + 3 + 1)
        ran = run(*command)
    assert (ran.code, ran.data["missing_prompts"], ran.data["n"]) == (130, 1, 1)
    assert ran.err.endswith("foveate: interrupted; the same command goes on in s\n")
    ran = run(*command)
    assert (ran.code, ran.data["missing_prompts"], ran.data["n"], ran.data["sessions"]) == (0, 0, 2, 2)
    assert (
        ran.err
        == "foveate: warning: times come from 2 processes; ratios were formed within turns of one process each\n"
    )


def test_ctrl_c_in_a_later_round_is_said_though_no_prompt_is_missing(
    run: Callable[..., Any],
    flags: list[object],
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two sides warm up, three calls are the first round of the only prompt.
    interrupt_after(monkeypatch, 2 + 3)
    flags = ["--prompts", "one.txt", "--runs", 2, *flags[-2:]]
    ran = run("compare", "-p", "skip-scales", *flags, "--json", "--store", "s")
    assert (ran.code, ran.data["missing_prompts"], ran.data["runs"]) == (130, 0, 1)
    assert "interrupted: timed runs are missing in some figures" in ran.err
    assert ran.err.endswith("foveate: interrupted; the same command goes on in s\n")


class Darkness:
    """A judge: the mean level."""

    name, is_error = "darkness", True

    def score(self, images: Any, references: Any, prompts: Any) -> Any:
        return 255 - images.mean(axis=(1, 2, 3))


def test_a_judge_by_its_name(
    run: Callable[..., Any],
    flags: list[object],
    calls: list[str],
) -> None:
    own = ("--judge", "tests.cli.test_studies:Darkness", "--fail-if", "darkness.max < 0")
    data = run("compare", "-p", "skip-scales", *flags, "--json", *own).data
    assert set(data["darkness"]) == {"mean", "p90", "max"}
    assert data["reference"]["darkness"]["mean"] != data["darkness"]["mean"]
    run("compare", "-p", "full", *flags, "--judge", "tests.cli.test_studies:PROMPTS").assert_refused("cannot load")
    run("compare", "-p", "full", *flags, "--judge", "builtins:dict").assert_refused("gives no judge")


def test_an_interval_of_a_speedup_needs_two_calls(run: Callable[..., Any], flags: list[object]) -> None:
    bound = ("--fail-if", "speedup.transformer.low < 1", "--batch-size", 2)
    run("compare", "-p", "skip-scales", *flags, *bound).assert_refused("needs two calls or more", "lower --batch-size")


def test_sweep_makes_a_table_a_plot_and_a_page(
    run: Callable[..., Any],
    flags: list[object],
    tmp_path: Path,
    calls: list[str],
) -> None:
    ran = run(
        "sweep", "-p", "skip-scales", "--over", "count=0..1", *flags, "--plot", "f.png", "--html", "f.html", "--json",
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert ran.data["sweep"] == {"policy": "skip-scales", "fields": ["count"]}
    assert [entry["settings"] for entry in ran.data["policies"]] == [{"count": "0"}, {"count": "1"}]
    assert ran.data["policies"][0]["identical"] == 2
    with Image.open(tmp_path / "f.png") as plot:
        assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 20
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert "Sweep" in page
    assert "foveate sweep" in page or "foveate" in page


def test_tune_writes_the_winner_that_generate_takes(
    run: Callable[..., Any],
    flags: list[object],
    tmp_path: Path,
    calls: list[str],
) -> None:
    (tmp_path / "h.txt").write_text("the house\na blue rocket\n")
    command = (
        "tune", "-p", "skip-scales", "--over", "count=0..1", "--subject-to", "psnr.p10 >= 99", "--held-out", "h.txt",
        *flags, "-o", "t.yaml", "--html", "t.html", "--quiet",
    )  # fmt: skip
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert "2 held-out prompts: an interval of a percentile is rough below 30" in ran.err
    assert "skip-scales:count=0 holds psnr.p10 >= 99 on held-out prompts: psnr.p10 at least 100" in ran.err
    tuned = yaml.safe_load((tmp_path / "t.yaml").read_text())
    assert (tuned["policy"], tuned["count"], tuned["provenance"]["n"]) == ("skip-scales", 0, 2)
    assert "psnr.p10 &gt;= 99" in (tmp_path / "t.html").read_text(encoding="utf-8")
    assert (tmp_path / "t.study/study.journal").is_file()
    calls.clear()
    again = run(*command[:-3], "--json")
    assert (again.code, calls) == (0, [])
    assert again.data["winner"]["spec"] == "skip-scales:count=0"
    json.dumps(again.data, allow_nan=False)
    mixed = run("compare", "-p", "skip-scales", *flags, "--store", "t.study")
    mixed.assert_refused('t.study was measured with other settings: kind was "study", is "comparison"')
    harder = [text if text != "psnr.p10 >= 99" else "psnr.p10 >= 100.5" for text in map(str, command)]
    run(*harder).assert_refused("t.study was measured with other settings: subject_to was")
    none = run(*harder, "--store", "u")
    assert none.code == 1
    assert "none of 2 trials holds psnr.p10 >= 100.5 on the tuning prompts" in none.err
