"""Where images go, as `--output` and `--format` say it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.core.suffixes import SUFFIXES

_FILE_ENDING = re.compile(r"\.(?!v\d+$)[a-z][a-z0-9]{1,4}")
"""Endings that mean a file: letters, as in .gif and .tiff; a version such as out.v2 or run-1.5 is a folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where images go: a folder, or one file in it.

    `suffix` is the ending of every image.
    """

    folder: Path
    file: str | None
    suffix: str

    @classmethod
    def of(cls, output: str, kind: str | None) -> "Place":
        """What `--output` and `--format` mean together.

        Raises:
            FoveateError: The name ends like a file that cannot be written, or not as the format says.
        """
        path = Path(output)
        ending = (path.suffix or path.name).lower()
        is_slashed = output.endswith(tuple(sep for sep in (os.sep, os.altsep) if sep))
        if is_slashed or ending not in SUFFIXES:
            if not is_slashed and not path.is_dir() and _FILE_ENDING.fullmatch(path.suffix.lower()):
                raise FoveateError(
                    f"cannot write {output}: an image ends in {', '.join(SUFFIXES)}; for a folder of this name add a "
                    "slash"
                )
            return cls(folder=path, file=None, suffix=f".{kind or 'png'}")
        if path.is_dir():
            raise FoveateError(f"cannot write {output}: it is a folder; put a slash behind it to write into it")
        if kind is not None and SUFFIXES[ending] != SUFFIXES[f".{kind}"]:
            raise FoveateError(f"--format {kind} and --output {output} disagree; leave --format out")
        if not path.suffix:
            raise FoveateError(f"cannot write {output}: there is no name in front of the ending")
        return cls(folder=path.parent, file=path.name, suffix=ending)
