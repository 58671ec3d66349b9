"""API keys: several, from a file or the environment, compared in constant time, read again when the file changes.

Only digests are held, so that no key can get into a log or a stack trace.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from foveate.core.errors import FoveateError

ENVIRONMENT = "FOVEATE_API_KEYS"
"""Keys with commas between them, beside those of the file."""

LOCAL = "local"
"""Whose everything is where no keys are asked for."""

SHORTEST = 16
_CHECK_S = 1.0
"""Seconds between two looks at the file."""

_PLAIN = re.compile(r"[\x21-\x7e]+")

logger = logging.getLogger("foveate.server")


class Keys:
    """The keys that let requests in; with none at the start, everybody may come.

    A file that cannot be read any more leaves the keys as they were; an empty one lets nobody in.

    Attributes:
        is_required: Whether a request needs a key; that never changes.
    """

    def __init__(
        self, file: Path | None = None, environment: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the keys.

        Args:
            file: One key a line; lines that begin with # are comments.
            environment: Keys with commas.
            clock: Seconds.

        Raises:
            FoveateError: The file cannot be read, holds no key, or one is too short or not ASCII.
        """
        self._file, self._clock = file, clock
        self._fixed = _digests(environment.split(","), f"the environment variable {ENVIRONMENT}")
        self._stamp = None if file is None else _stamp(file)
        self._digests = self._read()
        self._looked = clock()
        self.is_required = file is not None or bool(self._fixed)
        if self.is_required and not self._digests:
            raise FoveateError(f"{file} holds no key; write one a line, or leave --api-keys out")

    def owner(self, key: str) -> str | None:
        """Who a key belongs to, as a name that does not give it away; None if there is no such key.

        Takes the same time whichever key is compared, and however much of it is right.
        """
        self._look()
        given = _digest(key)
        # A list: every comparison is made, also behind the one that holds.
        found = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return found[0].hex() if found else None

    def _look(self) -> None:
        """Reads the file again if it has changed, and looks once a second at most."""
        now = self._clock()
        if self._file is None or now - self._looked < _CHECK_S:
            return
        self._looked = now
        try:
            stamp = _stamp(self._file)
            if stamp != self._stamp:
                self._digests, self._stamp = self._read(), stamp
                logger.warning("API keys were read again: there are %d", len(self._digests))
        except FoveateError as error:
            logger.error("API keys stay as they were: %s", error)

    def _read(self) -> tuple[bytes, ...]:
        if self._file is None:
            return self._fixed
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(self._file, error) from None
        return (*self._fixed, *_digests((line for line in lines if not line.strip().startswith("#")), str(self._file)))


def _digests(keys: Iterable[str], where: str) -> tuple[bytes, ...]:
    """Digests of keys; blanks around them and empty ones do not count.

    Raises:
        FoveateError: Says which key, by its place, and never what it is.
    """
    found = []
    for place, key in enumerate((key.strip() for key in keys), 1):
        if not key:
            continue
        if len(key) < SHORTEST or not _PLAIN.fullmatch(key):
            raise FoveateError(
                f"key {place} of {where} must have {SHORTEST} or more ASCII characters without blanks; "
                'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        found.append(_digest(key))
    return tuple(dict.fromkeys(found))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _unreadable(file: Path, error: OSError | UnicodeDecodeError) -> FoveateError:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return FoveateError(f"cannot read the API keys of {file}: {reason}")
