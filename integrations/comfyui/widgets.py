"""Widgets from the declarations of foveate's options, and the values of options from what widgets hold.

A call's options are declared in `foveate.pipeline.options`, those of loading in `foveate.cli.options.ModelOptions`.
Nothing of them is repeated here: name, type, choices, default and help of a widget come from there.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from foveate.cli.options import ModelOptions
from foveate.core.errors import FoveateError
from foveate.pipeline.option_texts import numbers
from foveate.pipeline.options import OPTIONS, Option, is_number

OWN = "default"
"""The choice that leaves an option out."""

_MOST_NUMBER = 2**31 - 1
_MOST_SEED = 2**53 - 1
"""The largest whole number that a browser's JSON keeps."""

_SWITCHES: Mapping[str, bool | None] = {OWN: None, "on": True, "off": False}
_LINKED = ("policy",)
"""Options that come through a link and have no widget."""
_ELSEWHERE = ("model", "threads")
"""Options of loading that are no widget of their name: threads are a setting of the whole process, ComfyUI's."""
_LONG = ("negative_prompt",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Widget:
    """One input of a node.

    Attributes:
        kind: ComfyUI's type: `INT`, `FLOAT`, `STRING` or `BOOLEAN`, or the choices of a list.
        default: What it holds at first.
        help: Shown over it.
        settings: Further settings of ComfyUI.
    """

    kind: str | tuple[str, ...]
    default: Any
    help: str
    settings: tuple[tuple[str, Any], ...] = ()

    def declared(self) -> tuple[Any, dict[str, Any]]:
        """As `INPUT_TYPES` has it."""
        kind = self.kind if isinstance(self.kind, str) else list(self.kind)
        return kind, {"default": self.default, "tooltip": self.help, **dict(self.settings)}

    def check(self, name: str, held: object) -> None:
        """Refuses what is not among the choices, and a number outside its bounds.

        Raises:
            FoveateError: It names the input.
        """
        if not isinstance(self.kind, str) and held not in self.kind:
            raise FoveateError(f"{name} must be one of {', '.join(self.kind)}, got {held!r}")
        bounds = dict(self.settings)
        if "min" in bounds and is_number(held) and not bounds["min"] <= held <= bounds["max"]:
            raise FoveateError(f"{name} must be in [{bounds['min']}, {bounds['max']}], got {held}")


def call_widgets() -> dict[str, Widget]:
    """The widgets of a call: those options that a form can hold, in their order."""
    kept = (option for option in OPTIONS.values() if option.is_kept or "generate" in option.commands)
    return {option.name: _of_option(option) for option in kept if option.name not in _LINKED}


def call_options(held: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call from what its widgets hold; what is left empty is left out.

    Raises:
        FoveateError: A choice that there is not, a text that holds no numbers, or a number out of range.
    """
    found = {}
    for name, widget in call_widgets().items():
        if held.get(name) is None:
            continue
        widget.check(name, held[name])
        value = _value(OPTIONS[name], held[name])
        if value is not None:
            found[name] = value
    return found


def check_per_scale(options: Mapping[str, Any]) -> None:
    """Checks values that may be one per scale, whatever the model; how many there must be follows from the model.

    Raises:
        FoveateError: One of them is out of range.
    """
    for name, given in options.items():
        rule = OPTIONS[name].rule
        if rule is not None and OPTIONS[name].per_scale:
            for value in given if isinstance(given, list) else [given]:
                rule.refuse(name, value)


def loading_widgets() -> dict[str, Widget]:
    """The widgets of loading, but for the model's name."""
    kinds, helps = get_type_hints(ModelOptions), _attributes(ModelOptions)
    found = {}
    for field in fields(ModelOptions):
        if field.name not in _ELSEWHERE:
            assert field.default is not MISSING, "a widget needs something to hold at first"
            found[field.name] = _of_field(kinds[field.name], field.default, helps[field.name])
    return found


def loading_options(held: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of loading from what its widgets hold; None where one is left empty.

    Raises:
        FoveateError: A choice that there is not.
    """
    found: dict[str, Any] = {}
    for name, widget in loading_widgets().items():
        value = held.get(name, widget.default)
        value = widget.default if value is None else value
        widget.check(name, value)
        found[name] = None if value in ("", OWN) else value.strip() if isinstance(value, str) else value
    return found


def _of_option(option: Option) -> Widget:
    tip = option.help + (" One number, or one per scale with commas." if option.per_scale else "")
    if option.name == "seed":
        seed = (("min", 0), ("max", _MOST_SEED), ("control_after_generate", True))
        return Widget(kind="INT", default=0, help="Image j uses seed + j.", settings=seed)
    if option.choices:
        return Widget(kind=option.choices, default=option.default, help=tip)
    if option.reads is bool:
        if option.default is None:
            return Widget(kind=tuple(_SWITCHES), default=OWN, help=tip)
        return Widget(kind="BOOLEAN", default=option.default, help=tip)
    if option.reads is str or option.takes_several:
        empty = f"{tip} Empty: none." if option.reads is str else f"{tip} Empty: the model's own."
        return Widget(kind="STRING", default="", help=empty, settings=(("multiline", option.name in _LONG),))
    return _of_number(option, tip)


def _of_number(option: Option, tip: str) -> Widget:
    """A number; where the option may be left out, 0 stands for that."""
    bounds: tuple[tuple[str, Any], ...] = (("min", 0), ("max", _MOST_NUMBER))
    tip = tip if option.default is not None else f"{tip} 0: not given."
    if option.reads is int:
        return Widget(kind="INT", default=option.default or 0, help=tip, settings=bounds)
    return Widget(kind="FLOAT", default=float(option.default or 0), help=tip, settings=(*bounds, ("step", 0.01)))


def _value(option: Option, held: Any) -> Any:  # noqa: ANN401 - of whatever kind the option is
    if isinstance(held, str):
        if option.reads is bool:
            return _SWITCHES[held]
        if option.takes_several and held.strip():
            return numbers(option.name, [held], int if option.reads is int else float)
        return held.strip() or None
    left_out = option.default is None and option.name != "seed" and option.reads in (int, float) and held == 0
    return None if left_out else held


def _of_field(kind: Any, default: Any, tip: str) -> Widget:  # noqa: ANN401 - of whatever kind a field is
    kinds = [one for one in (get_args(kind) or (kind,)) if one is not NoneType]
    literal = kind if get_origin(kind) is Literal else next((one for one in kinds if get_origin(one) is Literal), None)
    if literal is not None:
        choices = get_args(literal)
        return Widget(
            kind=choices if default is not None else (OWN, *choices),
            default=OWN if default is None else default,
            help=tip,
        )
    if kind is bool:
        return Widget(kind="BOOLEAN", default=default, help=tip)
    return Widget(kind="STRING", default="" if default is None else str(default), help=tip)


def _attributes(record: type) -> dict[str, str]:
    """The helps of a record's fields, from the part `Attributes` of its docstring."""
    text = (record.__doc__ or "").partition("Attributes:")[2]
    return {
        name: " ".join(tip.split()) for name, tip in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    }
