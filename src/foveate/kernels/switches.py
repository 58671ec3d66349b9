"""Environment variables that switch code off: 0 is off, 1 is on, and so is a variable that is unset or empty.

They are read when the code is first wanted. Anything else that stands in one of them is an error.
"""

import os
from typing import Literal, get_args

from foveate.core.errors import FoveateError

Switch = Literal["FOVEATE_NATIVE", "FOVEATE_AMX", "FOVEATE_ONEDNN", "FOVEATE_KEEP_HEAP"]
"""C code on a CPU; its attention by AMX; linear layers by oneDNN's own operators; memory kept while a request runs."""

SWITCHES: tuple[Switch, ...] = get_args(Switch)


def is_on(name: Switch) -> bool:
    """Whether a switch is on.

    Raises:
        FoveateError: The variable holds neither 0 nor 1.
    """
    given = os.environ.get(name) or "1"
    if given not in ("0", "1"):
        raise FoveateError(f"{name} must be 0 or 1, got {given!r}; unset it to leave it on")
    return given == "1"


def describe() -> dict[str, bool]:
    """Every switch and whether it is on.

    Raises:
        FoveateError: As `is_on`.
    """
    return {name: is_on(name) for name in SWITCHES}
