"""Files that appear complete or not at all."""

import stat
from pathlib import Path

import pytest

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError


def write_half_and_fail(path: Path) -> None:
    with replace_file(path) as partial:
        partial.write_text("half")
        raise KeyError("stopped")


def test_replaces_and_everyone_may_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o600)
    write_text(path, "n\u00e9w")
    assert path.read_text(encoding="utf-8") == "n\u00e9w"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_half_and_fail(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FoveateError, match="there is no folder"):
        write_text(tmp_path / "none" / "a.txt", "")
