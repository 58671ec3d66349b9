"""Finished images behind urls for several processes: one folder that all of them see, and nothing in memory.

A file's name is a digest of owner and id, so that neither is told; its time of change is when it expires. Files appear
whole, by renaming. Bounds are kept under a lock in the folder; reading needs none.
"""

import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from foveate.core.errors import FoveateError
from foveate.server.store import StoreFullError, StoreSettings
from foveate.server.store_folder import StoreFolder

logger = logging.getLogger("foveate.server")

_LOCK = ".lock"
_PART = ".part"
_LONGEST_WRITE_S = 600.0
_KINDS = ("png", "jpeg", "webp")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class _File:
    """A kept file; the first to expire is the oldest, as all are kept equally long."""

    expires: float
    path: Path
    size: int


class SharedStore:
    """As `ImageStore`, safe from any thread of any process; clocks of all machines must agree within seconds."""

    def __init__(
        self,
        folder: Path,
        settings: StoreSettings,
        *,
        own: StoreFolder | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Uses a folder that is there; who has it as its `own` deletes it at the end."""
        self._folder, self._settings, self._own, self._clock = folder, settings, own, clock

    @classmethod
    def make(cls, settings: StoreSettings, clock: Callable[[], float] = time.time) -> "SharedStore":
        """A store in a new folder, which only this user can read; what killed servers left there is deleted.

        Raises:
            FoveateError: It cannot be made.
        """
        try:
            own = StoreFolder(settings.folder)
        except OSError as error:
            raise FoveateError(f"cannot keep images in {settings.folder}: {error.strerror}") from None
        return cls(own.path.resolve(), settings, own=own, clock=clock)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    @property
    def held(self) -> tuple[int, int]:
        """Images and bytes that are kept now."""
        now = self._clock()
        sizes = [file.size for file in self._files() if file.expires > now]
        return len(sizes), sum(sizes)

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
        path = self._path(owner, name, media_type.partition("/")[2])
        with self._locked():
            files = self._alive()
            if any(file.path.stem == path.stem for file in files):
                return False
            while files and (len(files) >= limit.images or sum(file.size for file in files) + size > limit.bytes):
                _delete(files.pop(0))
            self._write(path, content, files)
        return True

    def holds(self, owner: str, name: str) -> bool:
        """Whether there is a file of this owner and name."""
        return any(self._changed(self._path(owner, name, kind)) > self._clock() for kind in _KINDS)

    def get(self, owner: str, name: str) -> tuple[bytes, str] | None:
        """A file and its media type; None if there is none for this owner, or it has expired."""
        for kind in _KINDS:
            path = self._path(owner, name, kind)
            if self._changed(path) <= self._clock():
                continue
            try:
                return path.read_bytes(), f"image/{kind}"
            except FileNotFoundError:
                return None
            except OSError as error:
                logger.error("a stored image cannot be read: %s", error.strerror)
        return None

    def expire(self) -> None:
        """Deletes what has expired, and what writers that were killed left; called now and then."""
        with self._locked():
            self._alive()
            for part in self._folder.glob(f".*{_PART}"):
                if self._changed(part) < self._clock() - _LONGEST_WRITE_S:
                    part.unlink(missing_ok=True)

    def close(self) -> None:
        """Deletes everything, where this is the store that made the folder."""
        if self._own is not None:
            self._own.close()

    def _path(self, owner: str, name: str, kind: str) -> Path:
        digest = hashlib.sha256(f"{owner}\0{name}".encode()).hexdigest()
        return self._folder / f"{digest}.{kind}"

    def _locked(self) -> FileLock:
        """The lock of all processes; one object each time, as one object may be entered twice by a thread."""
        return FileLock(self._folder / _LOCK)

    def _files(self) -> list[_File]:
        """Everything that is kept, the oldest first."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                if not entry.name.startswith("."):
                    found.append(_File(expires=stat.st_mtime, path=Path(entry.path), size=stat.st_size))
        return sorted(found)

    def _alive(self) -> list[_File]:
        """What has not expired; the rest is deleted. Under the lock."""
        files, now = self._files(), self._clock()
        for file in files:
            if file.expires <= now:
                _delete(file)
        return [file for file in files if file.expires > now]

    def _write(self, path: Path, content: bytes, files: list[_File]) -> None:
        """Writes a file; where the disk is full the oldest ones make room, as other programs may have filled it."""
        part = self._folder / f".{secrets.token_hex(8)}{_PART}"
        while True:
            try:
                part.write_bytes(content)
                expires = self._clock() + self._settings.seconds
                os.utime(part, (expires, expires))
                part.replace(path)
            except OSError as error:
                part.unlink(missing_ok=True)
                if error.errno in _FULL and files:
                    _delete(files.pop(0))
                    continue
                logger.error("an image cannot be kept: %s", error.strerror)
                raise StoreFullError(f"the image cannot be kept: {error.strerror}; ask for b64_json") from None
            return

    @staticmethod
    def _changed(path: Path) -> float:
        """The time of change, at which a kept file expires; long ago where there is none."""
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0


def _delete(file: _File) -> None:
    try:
        file.path.unlink(missing_ok=True)
    except OSError as error:
        logger.error("an expired image cannot be deleted: %s", error.strerror)
