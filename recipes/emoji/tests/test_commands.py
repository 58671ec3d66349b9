"""`python -m recipes.emoji`: what each command passes on, writes, and refuses before torch is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from recipes.emoji import heads, stages, start, text_match
from recipes.emoji.__main__ import main
from recipes.emoji.loop import PauseError
from recipes.emoji.recipe import Route
from recipes.emoji.tests.toy_corpus import write_corpus

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


def test_train_passes_everything_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def train(
        config: Path, out: Path, stage: str, log: Callable[[str], None], route: object, start: object, stop: object
    ) -> Path:
        seen.extend([config, out, stage, route, start, stop])
        log("half done")
        if stop is not None:
            raise PauseError("paused at 9.0 of 15 minutes")
        return out / "model"

    monkeypatch.setattr(stages, "train", train)
    (tmp_path / "r.yaml").write_text("name: toy\n")
    command = ("train", "r.yaml", "--output", "run", "--stage", "export", "--device", "cpu")
    options = ("--minutes-scale", 0.5, "--dry-run", "--start-from", "old", "--tokenizer", "t", "--keep-tokenizer")
    assert run(*command, *options) == (0, "run/model\n", "half done\n")
    route = Route(device="cpu", minutes_scale=0.5, keeps_tokenizer=True, is_dry=True)
    begin = start.Start(model=Path("old"), tokenizer=Path("t"))
    assert seen == [Path("r.yaml"), Path("run"), "export", route, begin, None]
    assert run(*command, "--stop-after", 9) == (75, "", "half done\npaused at 9.0 of 15 minutes\n")
    assert seen[-1] == 9.0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("train -o x", "RECIPE"),
        ("train none.yaml -o x", "no recipe at none.yaml"),
        ("train r.yaml -o x --minutes-scale 0", "--minutes-scale must be above 0, or 0 with --start-from, got 0.0"),
        ("train r.yaml -o x --keep-tokenizer", "name it with --tokenizer"),
        ("train r.yaml -o x --stop-after 0", "--stop-after must be above 0, got 0.0"),
        ("train r.yaml -o x --stage exprt", "--stage"),
        ("train r.yaml -o x", "cannot read the training file"),
        ("evaluate", "CORPUS"),
        ("evaluate none", "no corpus at none"),
        ("evaluate corpus --prompts 7", "--prompts must be at least 8, got 7"),
        ("evaluate corpus --seed -1", "--seed must be 0 or more, got -1"),
        ("heads none heads.safetensors", "no corpus at none"),
        ("heads corpus heads.safetensors", "corpus must hold images.npy"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(run: Run, tmp_path: Path, arguments: str, part: str) -> None:
    (tmp_path / "r.yaml").write_text("name: toy\n")
    (tmp_path / "corpus").mkdir()
    code, out, err = run(*arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert part in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "r.yaml"]


def test_help_imports_no_torch() -> None:
    code = "import sys\nfrom recipes.emoji.__main__ import main\nmain(['train', '--help'])\n"
    ran = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--start-from" in ran.stdout


def test_heads_are_checked_on_the_style_left_out_and_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", 64)
    style = json.loads((tmp_path / "corpus" / "drawings.jsonl").read_text().splitlines()[0])["style"]
    monkeypatch.setattr(heads, "TextMatchTraining", partial(heads.TextMatchTraining, num_steps=5))
    code, _, err = run("heads", "corpus", "heads.safetensors", "--held-out-style", style)
    assert (code, "the check needs 500 concepts" in err) == (2, True), err
    assert not (tmp_path / "heads.safetensors").exists()
    monkeypatch.setattr(text_match, "NUM_WAYS", 5)
    code, out, err = run("heads", "corpus", "heads.safetensors", "--held-out-style", style)
    assert (code, out) == (0, "heads.safetensors\n"), err
    assert f"on {style}" in err
    assert np.isfinite(heads.TextMatch.load(tmp_path / "heads.safetensors").image_weight).all()


@pytest.mark.soak
def test_the_report_holds_figures_and_sheets(run: Run, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 256)
    code, out, _ = run("evaluate", "corpus", "--prompts", 8, "-o", "report")
    assert code == 0
    figures = json.loads((tmp_path / "report" / "model.json").read_text(encoding="utf-8"))["figures"]
    named = {figure["name"]: figure for figure in figures}
    for name in ("background colour", "number of things", "style"):
        assert 0 <= named[name]["value"] <= 1
        assert named[name]["verdict"] in {"met", "missed"}
        assert f"| {name} |" in out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "model.json", "model.md", "sheet.png", "scenes.png",
    }  # fmt: skip
