"""A server under cancels, refusals and deadlines for a while: `FOVEATE_SOAK_SECONDS`, a minute by default."""

import json
import os
import sys
from pathlib import Path

import pytest
import serve_soak


@pytest.mark.soak
def test_nothing_leaks_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seconds = os.environ.get("FOVEATE_SOAK_SECONDS", "60")
    monkeypatch.setattr(sys, "argv", ["serve_soak.py", "--seconds", seconds, "--output", str(tmp_path / "soak.json")])
    code = serve_soak.main()
    found = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0, found
    assert found["calls_compared"] > 0
    assert json.loads(capsys.readouterr().out) == found
