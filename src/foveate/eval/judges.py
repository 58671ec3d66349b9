"""Judges that a caller brings: another opinion on every image, such as a feature distance or a match with the prompt.

A judge is named by an entry point of the group `foveate.judges`, or as `module:name`. What is named takes no arguments
and gives the judge, so a class does.

Axes: n images, Y pixel rows, X columns.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, UInt8

from foveate.core.errors import FoveateError, unknown

GROUP = "foveate.judges"


@runtime_checkable
class Judge(Protocol):
    """Scores every image, by its reference, by its prompt, or by both.

    A judge whose scores depend on more than its class, such as on weights or labels, also has a text `fingerprint` of
    these: a store does not go on with another one.

    Attributes:
        name: What figures call it, in lower case with underscores, such as `text_match`.
        is_error: Whether less is better, as of a distance.
    """

    name: str
    is_error: bool

    def score(
        self,
        images: UInt8[np.ndarray, "n Y X 3"],
        references: UInt8[np.ndarray, "n Y X 3"],
        prompts: Sequence[str],
    ) -> Float64[np.ndarray, " n"]:
        """One finite value per image; the same for the same image, whatever else is scored with it.

        Args:
            images: Images to judge. The references themselves are judged as well, against themselves.
            references: The full run's images of the same prompts and seeds.
            prompts: One for each image.
        """
        ...


def identity(judge: Judge) -> dict[str, str | None]:
    """What tells a judge from another one of the same name: its class, and its `fingerprint` if it has one."""
    kind = type(judge)
    fingerprint = getattr(judge, "fingerprint", None)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "fingerprint": None if fingerprint is None else str(fingerprint),
    }


def load_judge(name: str) -> Judge:
    """A judge by its entry point or as `module:name`.

    Raises:
        FoveateError: There is none, it cannot be imported, or it is not a judge.
    """
    try:
        if ":" in name:
            module, _, attribute = name.partition(":")
            make = getattr(import_module(module), attribute)
        else:
            known = {entry.name: entry for entry in entry_points(group=GROUP)}
            if name not in known:
                raise unknown("judge", name, sorted(known) or ["none installed"], "; or name one as module:name")
            make = known[name].load()
        judge = make()
    except (ImportError, AttributeError, TypeError) as error:
        raise FoveateError(f"cannot load the judge {name}: {error}") from error
    if not isinstance(judge, Judge):
        raise FoveateError(f"{name} gives no judge: it needs name, is_error and score, got {type(judge).__name__}")
    return judge
