"""Runs the command line in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foveate.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Ran:
    """Exit code and both streams of one command."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, "exactly one line"
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def assert_refused(self, *parts: str) -> None:
        """One line on stderr that starts with the program's name and holds the parts; nothing on stdout; code 2."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("foveate: ")
        assert self.err.count("\n") == 1, self.err
        for part in parts:
            assert part in self.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Ran(code=code, out=out, err=err)

    return call
