"""Models that installed packages bring: folders in our format, named in the entry point group `foveate.models`."""

import functools
import os
import warnings
from importlib.metadata import entry_points
from pathlib import Path

from foveate.core.errors import FoveateError

DEMO_NAMES = ("emoji", "emoji-tiny", "emoji-eight")
"""Names of the demonstration package, so that what is missing without it can be said."""

DEMO_REMEDY = 'pip install "foveate[demo]"'


def refuse_missing_demo(name: str) -> None:
    """Says what to install for a model of the demonstration package.

    Raises:
        FoveateError: The name is one of `DEMO_NAMES`, and the package is not installed.
    """
    if name in DEMO_NAMES and name not in packaged_models():
        raise FoveateError(f"{name} comes in a package of its own, which is not installed: {DEMO_REMEDY}")


@functools.cache
def packaged_models() -> dict[str, Path]:
    """Folders of models by name, the shortest names of a folder first; callers leave it as it is.

    Packages are looked up once per process; `packaged_models.cache_clear()` has them looked up anew. A package that
    cannot be imported, or whose entry is not a path, is named in one warning and left out.
    """
    found, broken = {}, []
    for entry in sorted(entry_points(group="foveate.models"), key=lambda entry: (len(entry.name), entry.name)):
        try:
            folder = entry.load()
            if not isinstance(folder, str | os.PathLike):
                raise TypeError(f"it is not the path of a folder: {folder!r}")
            found[entry.name] = Path(folder)
        except Exception as error:  # a broken package must not stop the rest
            broken.append(f"model package {entry.name} ({entry.value}) was left out: {error}")
    for message in broken:
        warnings.warn(message, stacklevel=3)
    return found
