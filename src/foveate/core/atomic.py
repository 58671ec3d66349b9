"""Files that appear complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveate.core.errors import FoveateError

MODE = 0o644
"""Everyone may read: some writers leave files that only their owner reads."""


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Hands out a hidden file beside `path` to write to, and gives it that name when the block ends.

    If the block raises, the hidden file is removed and a file that was at `path` stays as it was.

    Raises:
        FoveateError: The folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FoveateError(f"cannot write {path}: there is no folder {path.parent}")
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".part", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(MODE)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8, complete or not at all."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
