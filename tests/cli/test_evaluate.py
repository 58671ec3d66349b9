"""`foveate eval`: the bundled model against a toy corpus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.toy_corpus import write_corpus


@pytest.mark.soak
def test_the_command_writes_figures_and_sheets(run: Callable[..., Any], tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus", 256)
    ran = run("eval", "default-model", "--corpus", "run/corpus", "--prompts", 8, "--out", "report", "--json", "-q")
    assert ran.code == 0
    named = {figure["name"]: figure for figure in ran.data["figures"]}
    for name in ("background colour", "number of things", "style"):
        assert 0 <= named[name]["value"] <= 1
        assert named[name]["verdict"] in {"met", "missed"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "model.json", "model.md", "sheet.png", "scenes.png",
    }  # fmt: skip


def test_what_cannot_be_measured_is_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus", 256)
    run("eval", "default-model", "--corpus", "none").assert_refused("no corpus at none")
    run("eval", "default-model", "--corpus", "run/corpus", "--prompts", 2).assert_refused("--prompts")
