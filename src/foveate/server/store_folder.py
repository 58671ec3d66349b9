"""The folder of one store: held by a lock that ends with its process, so that the next start finds what is left.

A server that is killed cannot delete its files. The lock (flock) lies on the folder itself, and the system takes it
back when the process is gone, whatever its number and in whichever container it was.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("foveate.server")

_PREFIX, _UNLOCKED = "foveate-store-", ".foveate-new-"
"""Of folders that are locked, and of those that are about to be."""


class StoreFolder:
    """A folder of this process, which only this user can read.

    Attributes:
        path: Where it is.
    """

    def __init__(self, parent: Path | None) -> None:
        """Deletes what processes of this user that are gone left in `parent`, and makes a folder there.

        Args:
            parent: Made where there is none; None takes the system's folder for temporary files.

        Raises:
            OSError: A folder cannot be made.
        """
        if parent is not None:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent))
        _sweep(new.parent)
        self._lock = _locked(new)
        # Renamed under its lock, so that no other start sees it without.
        self.path = new.rename(new.with_name(new.name.replace(_UNLOCKED, _PREFIX, 1)))

    def close(self) -> None:
        """Deletes it; nothing the second time."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sweep(parent: Path) -> None:
    """Deletes folders of this user whose process is gone."""
    for folder in parent.glob(f"{_PREFIX}*"):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            shutil.rmtree(folder)
            logger.info("deleted the images that a server left which did not end by itself")
        except OSError as error:
            logger.warning("a folder that a server left cannot be deleted: %s", error.strerror)
        finally:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Takes the lock of a folder of this user; None where somebody holds it, or the system has no such locks."""
    if sys.platform == "win32":
        return None
    import fcntl  # noqa: PLC0415 - Windows has none

    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    os.close(lock)
    return None
