"""Files that appear together or not at all: written to a hidden folder next to their place, then moved."""

import os
import re
import shutil
import tempfile
import unicodedata
from pathlib import Path
from types import TracebackType

from foveate.core.errors import FoveateError

_SLUG_LENGTH = 60


class Staging:
    """The files of one command, on their way to a folder; `with` removes what was not published.

    Entering it already writes the hidden folder, so a place that cannot be written is found before any work is done.
    """

    def __init__(self, folder: Path | None) -> None:
        """Keeps the place in mind; None stands for nothing to write."""
        self.folder = folder
        self._hidden: Path | None = None

    def __enter__(self) -> "Staging":
        """Makes the hidden folder.

        Raises:
            FoveateError: Nothing can be written there.
        """
        if self.folder is None:
            return self
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        try:
            self._hidden = Path(tempfile.mkdtemp(prefix=".foveate-", dir=place))
        except OSError as error:
            reason = f"{place}: {error.strerror}"
            raise FoveateError(f"cannot write to {self.folder} ({reason}); choose another place") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hidden folder and what is left in it."""
        if self._hidden is not None:
            shutil.rmtree(self._hidden, ignore_errors=True)
            self._hidden = None

    def path(self, name: str) -> Path:
        """Where to write a file that shall be called `name` in the end."""
        assert self._hidden is not None, "staging is used inside `with`"
        return self._hidden / name

    def publish(self) -> None:
        """Moves all files to their place; files of the same names are replaced.

        Raises:
            FoveateError: A folder is in the way; nothing was moved.
        """
        assert self._hidden is not None, "staging is used inside `with`"
        assert self.folder is not None, "staging without a folder has nothing to publish"
        staged = sorted(self._hidden.iterdir())
        for file in staged:
            if (self.folder / file.name).is_dir():
                raise FoveateError(f"cannot write {self.folder / file.name}: it is a folder; choose another place")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in staged:
            os.replace(file, self.folder / file.name)


def slug(prompt: str) -> str:
    """The words of a prompt as a file name, at most 60 characters; letters of any script stay."""
    plain = unicodedata.normalize("NFKC", prompt).casefold()
    words = "-".join(re.findall(r"\w+", plain))
    return words[:_SLUG_LENGTH].strip("-_") or "image"


def unique_names(stems: list[str]) -> list[str]:
    """The same names, with -2, -3 ... behind repeated ones."""
    taken: set[str] = set()
    names: list[str] = []
    for stem in stems:
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        names.append(name)
    return names
