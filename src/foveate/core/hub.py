"""Tells hub repositories from local paths, and pinned revisions from moving ones."""

import re
from pathlib import Path

from foveate.core.errors import CheckpointError

_REPOSITORY = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_SUFFIX = re.compile(r"\.[a-z]\w*$", re.ASCII | re.IGNORECASE)
"""Ending of a file. That of a version begins with a digit, as in `owner/model-2.5`."""
_PATH = re.compile(r"[/\\]|^[.~]")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.IGNORECASE)


def is_repository(name: str | Path) -> bool:
    """Whether the hub may be asked for a name: `owner/name` without a file's ending, and no such folder or file here.

    Everything else is a path, and so is every `Path`.
    """
    if isinstance(name, Path) or not _REPOSITORY.fullmatch(name):
        return False
    return not _SUFFIX.search(name) and not Path(name).exists()


def is_like_a_path(name: str) -> bool:
    """Whether a name is written as only paths are, and not as that of a model may be."""
    return _PATH.search(name) is not None or _SUFFIX.search(name) is not None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash; branches, tags and no revision at all can move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def no_such_file(what: str, name: str | Path) -> CheckpointError:
    """The error for a path at which nothing is."""
    home = " (`~` is not expanded)" if str(name).startswith("~") else ""
    return CheckpointError(
        f"no {what} at {name}: no such file or folder{home}; give an existing path, or owner/name on the hub"
    )
