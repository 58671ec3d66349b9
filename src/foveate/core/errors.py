"""Errors that foveate raises for what a caller can get wrong."""

import difflib
from collections.abc import Sequence

_LONGEST_NAME = 80
"""Characters of a name that an error compares and quotes; comparing takes more than linear time."""

_MAX_NAMED = 5
"""Images that an error lists."""


class FoveateError(ValueError):
    """Something a caller can mend; the message says what was asked, what came and the remedy."""


class PlanConflictError(FoveateError):
    """Two policies ask for things that cannot both be done; the message names them and says why."""


class CheckpointError(FoveateError):
    """A weight file is missing, damaged or of another model; the key, shape or file is named."""


class UnsupportedError(FoveateError):
    """What was asked for exists in the field but not in this version of foveate."""


class BrokenNumbersError(FoveateError):
    """Numbers of some images are NaN or infinite; the other images of the batch are whole.

    Attributes:
        reason: Scale, part and remedy.
        images: Which images of the request or call.
    """

    def __init__(self, reason: str, images: Sequence[int]) -> None:
        """Names the images by index."""
        self.reason, self.images = reason, tuple(images)
        which = f"image{'s' if len(self.images) > 1 else ''} {', '.join(map(str, self.images[:_MAX_NAMED]))}"
        more = len(self.images) - _MAX_NAMED
        super().__init__(f"{which}{f' and {more} more' if more > 0 else ''}: {reason}")


def unknown(kind: str, name: str, known: Sequence[str], rest: str = "") -> FoveateError:
    """The error for a name that does not exist: suggests the closest one and lists all.

    Args:
        kind: What the name should be one of, such as `policy`.
        name: What came.
        known: What there is.
        rest: Said behind the list.
    """
    name = str(name)
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return FoveateError(f"no {kind} {name!r}; {hint}there are {', '.join(known)}{rest}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device; torch's class for it is known by name, as importing torch takes long."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = ("out of memory", "Cannot allocate memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class Cancelled(Exception):  # noqa: N818 - a request to stop is not an error
    """A callback asked the engine to stop; the request's state is gone and nothing else changed."""
