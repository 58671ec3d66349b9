"""A server under cancels, refusals and deadlines, and beyond its capacity: a short form of `make soak-serve`."""

import json
import sys
from pathlib import Path

import pytest
import serve_overload
import serve_soak


@pytest.mark.soak
def test_nothing_leaks_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_soak.py", "--seconds", "60", "--output", str(tmp_path / "soak.json")])
    code = serve_soak.main()
    found = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0, found
    assert found["calls_compared"] > 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.soak
def test_more_than_it_can_serve_is_refused_and_nothing_is_lost() -> None:
    found = serve_overload.measured("emoji-tiny", 20.0, "python benchmarks/serve_overload.py --seconds 20")
    # Other tests run beside it, so that speed says nothing here.
    assert [name for name, holds in found["checks"].items() if not holds and "a second" not in name] == []
    assert len(found["checks"]) == 4
    assert found["sides"][-1]["rounds"][0]["requests"]["completed"] > 0
