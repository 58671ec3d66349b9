"""Recognises what a download leaves in place of a file: the pointer of Git LFS, or a web page."""

import re
from pathlib import Path

from foveate.core.errors import CheckpointError

_HEAD_BYTES = 1024
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
"""How pages of a web server begin, those that say why it gave nothing among them."""


def refuse_stand_in(path: Path) -> None:
    """Refuses a file that only stands for the real one; one that cannot be read is left to its reader.

    Raises:
        CheckpointError: Says what the file is, and how to get the real one.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return
    if head.startswith(_POINTER):
        raise CheckpointError(
            f"{path}: the file is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or "
            "download it again"
        )
    if _PAGE.match(head):
        raise CheckpointError(
            f"{path}: the file is a web page (HTML or XML), not the file itself; download it again by the link to the "
            "file, logged in where that is needed"
        )
