"""Reads the class of a class-conditional model: an index, or one of the names of an ImageNet class.

Source: the 1000 classes of ILSVRC 2012 in their usual order; the names are the lemmas of WordNet 3.0.
"""

import difflib
import re
from functools import cache
from importlib import resources

from foveate.core.errors import FoveateError

NUM_IMAGENET = 1000

_NUM_CLOSE = 3


def class_index(label: int | str, num_classes: int = NUM_IMAGENET) -> int:
    """The index of a class.

    Args:
        label: An index from 0 to `num_classes` - 1, as a number or in decimal digits, or a name, if there are 1000
            classes: any one of a class, or several of one class with commas between, as `class_names` has them. Upper
            case, blanks, hyphens and underscores make no difference.
        num_classes: Classes of the model, the unconditional one not counted.

    Raises:
        FoveateError: The index is out of range, or no class or more than one has the name; the error says which names
            are close, or which classes share it.
    """
    text = str(label).strip()
    if re.fullmatch(r"[+-]?\d+", text):
        if not 0 <= int(text) < num_classes:
            raise FoveateError(f"a class must be in [0, {num_classes - 1}], got {text}")
        return int(text)
    if num_classes != NUM_IMAGENET:
        raise FoveateError(
            f"only the {NUM_IMAGENET} classes of ImageNet have names, and this model has {num_classes}: "
            f"give an index from 0 to {num_classes - 1}, got {text!r}"
        )
    found = set.intersection(*(_by_name().get(_plain(name), set()) for name in text.split(",")))
    if len(found) == 1:
        return found.pop()
    raise _ambiguous(text, sorted(found)) if found else _unknown(text)


@cache
def class_names() -> tuple[str, ...]:
    """The names of the classes of ImageNet by index; synonyms have commas between."""
    path = resources.files("foveate") / "data" / "imagenet_classes.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


@cache
def _by_name() -> dict[str, set[int]]:
    """The classes that have a name; callers leave it as it is."""
    table: dict[str, set[int]] = {}
    for index, names in enumerate(class_names()):
        for name in names.split(","):
            table.setdefault(_plain(name), set()).add(index)
    return table


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _ambiguous(text: str, found: list[int]) -> FoveateError:
    choices = " or ".join(f"{index} ({class_names()[index]})" for index in found)
    return FoveateError(f"{text!r} names {len(found)} classes: give {choices}")


def _unknown(text: str) -> FoveateError:
    plain = _plain(text)
    # A word of a name says more than spelling: "cat" is nearer to "tabby cat" than to "vat".
    close = [name for name in _by_name() if plain and f" {plain} " in f" {name} "]
    close += difflib.get_close_matches(plain, _by_name(), n=_NUM_CLOSE)
    hint = f"did you mean {' or '.join(close[:_NUM_CLOSE])}? " if close else ""
    return FoveateError(f"no ImageNet class {text!r}; {hint}an index from 0 to {NUM_IMAGENET - 1} works too")
