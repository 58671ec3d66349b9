"""Locks between processes, and errors of the file system in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from foveate.core.errors import FoveateError


@contextmanager
def held(path: Path, patience_s: float, busy: str) -> Iterator[None]:
    """Keeps a lock, which the system releases also when this process is killed.

    Args:
        path: Its file.
        patience_s: How long another process is waited for.
        busy: What the error says if that was not enough.

    Raises:
        FoveateError: Another process has it, or the file system has no locks.
    """
    lock = FileLock(path, timeout=patience_s)
    try:
        lock.acquire()
    except Timeout:
        raise FoveateError(busy) from None
    except (OSError, NotImplementedError) as error:
        raise FoveateError(
            f"cannot lock {path}: {getattr(error, 'strerror', None) or error}; choose a place that can be written and "
            "whose file system has locks"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def saying_what_is_kept(folder: Path) -> Iterator[None]:
    """Puts an error of the file system in one line.

    Raises:
        FoveateError: What cannot be written and why.
    """
    try:
        yield
    except OSError as error:
        raise FoveateError(
            f"cannot write to {folder}: {error.strerror or error}; what is done is kept: mend this and run the same "
            "command again"
        ) from error
