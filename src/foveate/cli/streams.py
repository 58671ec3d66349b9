"""Standard streams that never stop a command: closed, full or broken ones, and characters that they cannot show."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from foveate.cli.console import note

_FAILED = 2
"""Exit code where a result could not be printed."""


class _Forgiving(io.RawIOBase):
    """Bytes on their way to a stream; after the first failure they are dropped, and the failure is kept.

    Without a target the stream is closed, and the first byte is the failure.
    """

    def __init__(self, target: io.RawIOBase | io.BufferedIOBase | None) -> None:
        super().__init__()
        self.failure: OSError | ValueError | None = None
        self._target = target

    @property
    def is_closed(self) -> bool:
        """Whether there was no stream from the beginning."""
        return self._target is None

    def writable(self) -> bool:
        """Yes."""
        return True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._target is not None and self._target.isatty()

    def fileno(self) -> int:
        """The number that the system gave the stream, where it has one."""
        if self._target is None:
            raise io.UnsupportedOperation("fileno")
        return self._target.fileno()

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        """Writes everything or drops it; returns the full length either way."""
        view = memoryview(data).cast("B")
        size = len(view)
        if self.failure is None:
            try:
                if self._target is None:
                    raise OSError("it is closed")
                while view:
                    written = self._target.write(view)
                    view = view[len(view) if written is None else written :]
                self._target.flush()
            except (OSError, ValueError) as error:
                self.failure = error
        return size


class Streams:
    """Both output streams of a command."""

    def __init__(self, out: _Forgiving | None) -> None:
        """Takes the bytes behind stdout; None if somebody else's object stands there, which is left alone."""
        self._out = out

    def settle(self, code: int) -> int:
        """Says if the result could not be printed; what was written to files is not concerned.

        Returns:
            The exit code: as it was where nobody wanted to read, 2 instead of 0 where writing failed.
        """
        sys.stdout.flush()
        failure = self._out.failure if self._out is not None else None
        if self._out is None or failure is None or isinstance(failure, BrokenPipeError):
            return code
        if self._out.is_closed:
            note("stdout is closed, so the result was not printed; the files of the command are complete")
            return code
        reason = (failure.strerror if isinstance(failure, OSError) else None) or str(failure)
        note(f"cannot print the result to stdout ({reason}), send it elsewhere; the files of the command are complete")
        return code or _FAILED


@contextmanager
def forgiving_streams() -> Iterator[Streams]:
    """Puts streams in the place of stdout and stderr that take everything; afterwards the old ones are back."""
    before = (sys.stdout, sys.stderr)
    if None in (sys.stdin, *before):
        _fill_numbers()
    out, err = _instead(sys.stdout), _instead(sys.stderr)
    sys.stdout, sys.stderr = out or sys.stdout, err or sys.stderr
    try:
        yield Streams(None if out is None else out.forgiving)
    finally:
        for stream in (out, err):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _fill_numbers() -> None:
    """Opens whatever of 0, 1 and 2 is closed, or the next file of the command would be written to as stdout."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - that of stderr
        pass
    os.close(number)


class _Text(io.TextIOWrapper):
    """Text over forgiving bytes."""

    forgiving: _Forgiving


def _instead(stream: object) -> _Text | None:
    """The stream to use instead; None for an object that is not a text stream over bytes; it is used as it is."""
    if stream is None or getattr(stream, "closed", False):
        return _text(_Forgiving(None), "utf-8", is_line_buffered=False, is_unbuffered=True)
    if not isinstance(stream, io.TextIOWrapper):
        return None
    raw = _Forgiving(getattr(stream.buffer, "raw", stream.buffer))
    try:
        stream.flush()
    except (OSError, ValueError) as error:
        raw.failure = error
    return _text(raw, stream.encoding, is_line_buffered=stream.line_buffering, is_unbuffered=bool(stream.write_through))


def _text(raw: _Forgiving, encoding: str, *, is_line_buffered: bool, is_unbuffered: bool) -> _Text:
    """Text in an encoding; characters that it does not have are escaped."""
    buffer = raw if is_unbuffered else io.BufferedWriter(cast("io.FileIO", raw))
    text = _Text(
        cast("IO[bytes]", buffer),
        encoding,
        errors="backslashreplace",
        line_buffering=is_line_buffered,
        write_through=is_unbuffered,
    )
    text.forgiving = raw
    return text
