"""Files that appear complete or not at all."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Sets the umask of this process inside."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def write_half_and_fail(path: Path, error: BaseException) -> None:
    with replace_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o027, 0o640)])
def test_replaces_with_the_permissions_that_the_umask_leaves(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o604)
    with umask(mask):
        write_text(path, "n\u00e9w")
    assert path.read_text(encoding="utf-8") == "n\u00e9w"
    assert stat.S_IMODE(path.stat().st_mode) == mode
    with umask(mask), replace_file(path) as partial:
        partial.unlink()
        partial.touch(0o600)
    assert stat.S_IMODE(path.stat().st_mode) == mode, "whatever the writer did"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError("stopped"), KeyboardInterrupt(), OSError(5, "Input/output error", "other")])
def test_what_fails_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half_and_fail(path, error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FoveateError, match="there is no folder"):
        write_text(tmp_path / "none" / "a.txt", "")


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), OSError("encoder error -2")):
        with pytest.raises(
            FoveateError, match=r"cannot write .*a\.txt: (No space left|encoder).*; choose another place"
        ):
            write_half_and_fail(tmp_path / "a.txt", error)
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("\u7ea2" * 85)
    write_text(path, "x")
    assert path.read_text() == "x"
    with pytest.raises(FoveateError, match="cannot write .*: File name too long"):
        write_text(tmp_path / ("\u7ea2" * 86), "x")
    with pytest.raises(FoveateError, match="cannot write .*: embedded null byte"):
        write_text(tmp_path / "a\0b", "x")
    assert list(tmp_path.iterdir()) == [path]


def test_folders_and_devices_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="it is a folder"):
        write_text(tmp_path, "x")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(FoveateError, match="it is not a regular file"):
        write_text(fifo, "x")
    assert fifo.is_fifo()
