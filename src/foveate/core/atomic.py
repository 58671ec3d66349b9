"""Files that appear complete or not at all."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.core.errors import FoveateError


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Hands out a hidden file beside `path` to write to, and gives it that name when the block ends.

    If the block raises, the hidden file is removed and a file that was at `path` stays as it was. The file gets the
    permissions that the umask leaves, whatever its writer gave it.

    Raises:
        FoveateError: The folder does not exist, nothing can be written there, or `path` is not a regular file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FoveateError(f"cannot write {path}: there is no folder {path.parent}")
    refuse_irregular(path)
    # Its length does not follow that of the name, which may be as long as the file system allows.
    partial = path.with_name(f".foveate-{secrets.token_hex(8)}.part")
    try:
        mode = _create(partial)
        yield partial
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.filename not in (None, str(partial)):
            raise
        raise FoveateError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refuse_irregular(path: Path) -> None:
    """Refuses a folder or a device, which a file must not replace, and a name that no file can have.

    Raises:
        FoveateError: Such a thing is at `path`.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        # A name that is too long, or that holds a NUL.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FoveateError(f"cannot write {path}: {reason}; choose another place") from None
    if not stat.S_ISREG(mode):
        what = "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file"
        raise FoveateError(f"cannot write {path}: {what}; choose another place")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, complete or not at all."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def move_durably(partial: Path, path: Path) -> None:
    """Gives a complete file its name, so that it is there with its content also after a power cut.

    Args:
        partial: Complete and closed, on the same file system as `path`.
        path: A file of this name is replaced at once; its folder must exist.

    Raises:
        OSError: It cannot be written; `path` is as it was.
    """
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(path: Path) -> int:
    """Makes an empty file; returns the permissions that the umask left it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
