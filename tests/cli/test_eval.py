"""`foveate eval`: what it prints and writes, and what it refuses before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.cli import evaluate as command
from foveate.eval.figures import Figure
from foveate.train.examiner import Examiner
from tests.toy_corpus import write_toy_corpus


def test_the_command_writes_and_prints_all_of_it(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_toy_corpus(tmp_path / "corpus")
    short = (Figure(name="style", value=0.5, ceiling=1.0, target=0.9), Figure(name="pairs", value=None, note="none"))
    monkeypatch.setattr(Examiner, "figures", lambda _: iter(short))
    ran = run("eval", "default-model", "--corpus", corpus, "--prompts", 8, "-m", toy_folder, "--out", "o", "--json")
    assert [figure["verdict"] for figure in ran.data["figures"]] == ["missed", ""]
    assert json.loads((tmp_path / "o" / "model.json").read_text()) == ran.data
    assert "| style | 50% | 100% | >= 90% | missed |  |" in (tmp_path / "o" / "model.md").read_text()
    for name in ("sheet.png", "scenes.png"):
        assert Image.open(tmp_path / "o" / name).width == 12 * 128
    assert "sheets" in ran.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--corpus"]),
        (["--corpus", "none"], ["no corpus at none", "--stage corpus"]),
        (["--corpus", "."], ["must hold images.npy"]),
        (["--corpus", ".", "--prompts", "7"], ["--prompts must be 8 or more, got 7"]),
        (["--corpus", ".", "--seed", "-1"], ["--seed must be 0 or more, got -1"]),
    ],
)
def test_refusals(run: Callable[..., Any], tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    run("eval", "default-model", *arguments).assert_refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_said_with_its_remedy(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "torchmetrics" else object())
    run("eval", "default-model", "--corpus", ".").assert_refused(
        'needs torchmetrics, not installed: pip install "foveate[eval]"'
    )
