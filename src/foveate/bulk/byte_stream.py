"""Bytes of a text file in blocks: decompressed, and in UTF-8 whatever Unicode the file is written in."""

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from foveate.core.errors import FoveateError
from foveate.core.text_file import codec_of

BLOCK_BYTES = 1 << 20
"""Of one read."""

MAX_ROW_BYTES = 64 << 20
"""A row that is larger is none: such a file is no text, or has no ends of lines."""

_LONGEST_MARK = 4
_UTF8_MARK = codecs.BOM_UTF8


class Mark(NamedTuple):
    """Where a row begins.

    Attributes:
        offset: Bytes in front of it, of the file in UTF-8.
        number: Its line, or which entry or row of the file it is, from 1.
    """

    offset: int = 0
    number: int = 1


class ByteStream:
    """A text file that is open; hashes what it reads, decompressed and as it is written.

    Attributes:
        name: Said in errors.
        is_seekable: Whether reading may begin in the middle; compressed files and those in UTF-16 or UTF-32 are read
            from the beginning.
    """

    def __init__(self, path: Path, name: str, offset: int = 0) -> None:
        """Opens a file.

        Args:
            path: Where.
            name: Said in errors.
            offset: Bytes to skip, of a file that is seekable.

        Raises:
            FoveateError: It cannot be read.
        """
        self.name, self._digest = name, hashlib.sha256()
        with self._readable():
            is_compressed = path.suffix.lower() == ".gz"
            self._file = gzip.open(path) if is_compressed else path.open("rb")  # noqa: SIM115 - `__exit__` closes it
        try:
            with self._readable():
                codec = codec_of(self._file.read(_LONGEST_MARK))
                self._file.seek(offset)
        except FoveateError:
            self._file.close()
            raise
        self._codec, is_utf8 = codec.upper(), codec.startswith("utf-8")
        self._decoder = None if is_utf8 else codecs.getincrementaldecoder(codec)("surrogatepass")
        self.is_seekable = is_utf8 and not is_compressed

    def __enter__(self) -> "ByteStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """The next bytes in UTF-8, about as many as asked for; none at the end.

        Raises:
            FoveateError: The file cannot be read, is damaged, or is not in the Unicode that its beginning says.
        """
        while True:
            with self._readable():
                data = self._file.read(size)
            self._digest.update(data)
            if self._decoder is None:
                return data
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise FoveateError(f"{self.name} is not {self._codec} ({error.reason}); save it as UTF-8") from None
            if text or not data:
                return text.encode("utf-8", "surrogatepass")

    def sha256(self) -> bytes:
        """The hash of the whole file; reads the rest of it.

        Raises:
            FoveateError: As `read`.
        """
        while self.read():
            pass
        return self._digest.digest()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FoveateError(f"{self.name} is damaged or cut off ({error}); compress it again") from None
        except OSError as error:
            raise FoveateError(f"cannot read {self.name}: {error.strerror or error}") from None
        except ValueError as error:
            # A path with a NUL character.
            raise FoveateError(f"cannot read {self.name!r}: {error}") from None


def lines(stream: ByteStream, at: Mark) -> Iterator[tuple[int, int, bytes]]:
    """Lines as editors count them, ended by LF, CRLF or CR: offset, number, and the bytes with their end.

    A byte order mark at the beginning is left out.

    Raises:
        FoveateError: As `ByteStream.read`, or a line is larger than any row.
    """
    offset, number, rest = at.offset, at.number, b""
    while block := stream.read(max(BLOCK_BYTES, len(rest))):
        found = (rest + block).splitlines(keepends=True)
        # A line may go on in the next block, and an LF may follow a CR.
        rest = b"" if found[-1].endswith(b"\n") else found.pop()
        if len(rest) > MAX_ROW_BYTES:
            raise FoveateError(
                f"{stream.name} line {number + len(found)} has over {MAX_ROW_BYTES >> 20} MiB; is it text?"
            )
        if offset == 0 and found and found[0].startswith(_UTF8_MARK):
            yield 0, number, found[0][len(_UTF8_MARK) :]
            offset, number = len(found.pop(0)), number + 1
        for line in found:
            yield offset, number, line
            offset += len(line)
            number += 1
    if rest:
        yield offset, number, rest.removeprefix(_UTF8_MARK) if offset == 0 else rest
