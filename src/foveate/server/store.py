"""Finished images behind urls: bounded in number, bytes and time, each for the key that made it.

Files lie in a folder of the server's own and are gone when it ends. What does not fit pushes out the oldest.
"""

import errno
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from foveate.core.errors import FoveateError
from foveate.server.store_folder import StoreFolder

logger = logging.getLogger("foveate.server")

_FULL = (errno.ENOSPC, errno.EDQUOT)


class StoreFullError(FoveateError):
    """An image cannot be kept: the disk is full, or it is larger than the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """How much is kept.

    Attributes:
        folder: Where a folder of the server's own is made, made itself where there is none; None takes the system's
            for temporary files.
        images: At most.
        bytes: Of all files together, at most.
        seconds: How long an image is kept.
    """

    folder: Path | None = None
    images: int = 1000
    bytes: int = 1 << 30
    seconds: float = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A kept file."""

    path: Path
    media_type: str
    size: int
    expires: float


@runtime_checkable
class Store(Protocol):
    """What a server needs of a store; safe from any thread."""

    @property
    def held(self) -> tuple[int, int]:
        """Images and bytes that are kept now."""

    def put(self, owner: str, name: str, content: bytes, media_type: str) -> bool:
        """Keeps a file, unless there is one of the same owner and name; whether it did.

        Raises:
            StoreFullError: It cannot be kept.
        """

    def holds(self, owner: str, name: str) -> bool:
        """Whether there is a file of this owner and name."""

    def get(self, owner: str, name: str) -> tuple[bytes, str] | None:
        """A file and its media type; None if there is none for this owner, or it has expired."""

    def expire(self) -> None:
        """Deletes what has expired."""

    def close(self) -> None:
        """Deletes everything, where it is this one's to delete."""


class ImageStore:
    """Files by owner and id; safe from any thread."""

    def __init__(self, settings: StoreSettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the folder, which only this user can read, and the one around it where there is none.

        Raises:
            FoveateError: It cannot be made.
        """
        self._settings, self._clock = settings, clock
        try:
            self._own = StoreFolder(settings.folder)
        except OSError as error:
            raise FoveateError(f"cannot keep images in {settings.folder}: {error.strerror}") from None
        self._folder = self._own.path
        self._lock = threading.Lock()
        # In the order in which they came, which is also that in which they expire.
        self._files: dict[tuple[str, str], Stored] = {}
        self._bytes = 0

    @property
    def held(self) -> tuple[int, int]:
        """Images and bytes that are kept now."""
        return len(self._files), self._bytes

    def put(self, owner: str, name: str, content: bytes, media_type: str) -> bool:
        """Keeps a file, unless there is one of the same owner and name, which stays as it is.

        Returns:
            Whether it was kept.

        Raises:
            StoreFullError: It does not fit even into an empty store, or the disk is full.
        """
        size, limit = len(content), self._settings
        if size > limit.bytes:
            raise StoreFullError(f"an image of {size} bytes does not fit into the store, which holds {limit.bytes}")
        path = self._folder / hashlib.sha256(f"{owner}\0{name}".encode()).hexdigest()
        with self._lock:
            self._expire()
            if (owner, name) in self._files:
                return False
            while self._files and (len(self._files) >= limit.images or self._bytes + size > limit.bytes):
                self._forget(next(iter(self._files)))
            self._write(path, content)
            expires = self._clock() + limit.seconds
            self._files[owner, name] = Stored(path=path, media_type=media_type, size=size, expires=expires)
            self._bytes += size
        return True

    def holds(self, owner: str, name: str) -> bool:
        """Whether there is a file of this owner and name."""
        with self._lock:
            self._expire()
            return (owner, name) in self._files

    def get(self, owner: str, name: str) -> tuple[bytes, str] | None:
        """A file and its media type; None if there is none for this owner, or it has expired."""
        with self._lock:
            self._expire()
            found = self._files.get((owner, name))
            if found is None:
                return None
            try:
                return found.path.read_bytes(), found.media_type
            except OSError as error:
                logger.error("a stored image is gone: %s", error.strerror)
                self._forget((owner, name))
                return None

    def expire(self) -> None:
        """Deletes what has expired; called now and then, as a quiet server puts nothing."""
        with self._lock:
            self._expire()

    def close(self) -> None:
        """Deletes everything."""
        with self._lock:
            self._files.clear()
            self._bytes = 0
            self._own.close()

    def _write(self, path: Path, content: bytes) -> None:
        """Writes a file; where the disk is full the oldest ones make room, as other programs may have filled it."""
        while True:
            try:
                path.write_bytes(content)
            except OSError as error:
                path.unlink(missing_ok=True)
                if error.errno in _FULL and self._files:
                    self._forget(next(iter(self._files)))
                    continue
                logger.error("an image cannot be kept: %s", error.strerror)
                raise StoreFullError(f"the image cannot be kept: {error.strerror}; ask for b64_json") from None
            return

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, found in self._files.items() if found.expires <= now]:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        found = self._files.pop(key, None)
        if found is not None:
            self._bytes -= found.size
            try:
                found.path.unlink(missing_ok=True)
            except OSError as error:
                logger.error("an expired image cannot be deleted: %s", error.strerror)
