"""The options of a call, each declared once: type, meaning, default, rule, flag, and whether an image's file keeps it.

The keyword arguments of `Pipeline.__call__`, the flags of the command line, the keys of a configuration file, and what
an image's file stores and `--from` reads back all follow from `Options`. Nothing here imports torch, as `--help` reads
it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    SupportsFloat,
    SupportsIndex,
    TypedDict,
    TypeGuard,
    cast,
    get_args,
    get_origin,
)

from foveate.core.errors import FoveateError
from foveate.pipeline.foreign import unknown_option

if TYPE_CHECKING:
    import torch

    from foveate.core.policy import Policy

PerScale = SupportsFloat | Sequence[SupportsFloat]
"""One value for all scales, or one per scale. Numbers of NumPy do, here and below."""

StepCallback = Callable[[Any, int, int, dict[str, Any]], object]
"""Called as (pipe, scale, scales still to come, {"latents": tensor}); raises `Cancelled` to stop."""

OutputType = Literal["pil", "np", "pt", "latent"]

MAX_FLOAT32 = 3.4028234663852886e38

_SAMPLING = ("generate", "batch", "compare")
_GENERATE = ("generate", "batch")
_ONE_CALL = ("generate",)
"""Not for a run of many calls, or there with a meaning of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a value must be: a test, how an error says it, and what to do instead."""

    holds: Callable[[Any], bool]
    words: str
    remedy: str = ""

    def refuse(self, name: str, value: object) -> None:
        """Checks a value.

        Raises:
            FoveateError: It breaks the rule.
        """
        if not self.holds(value):
            raise self.error(name, value)

    def error(self, name: str, value: object) -> FoveateError:
        """What is said of a value that breaks the rule."""
        return FoveateError(f"{name} must be {self.words}, got {value!r}{self.remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What an option is beside its type.

    Attributes:
        help: What it does; `--help` shows it.
        default: Where a call does not say; None stands for the model's own.
        rule: What a value must be, or every value of those that are given per scale. Choices, switches and aliases need
            none.
        per_scale: Whether it may be one value per scale; its default is that of the same name in `Defaults`.
        commands: Which commands have it as a flag.
        flags: Names of the flag; empty for the option's own, `--top-k`.
        group: Heading in `--help`.
        is_kept: Whether an image's file keeps it.
        absent: For an option that is kept since some version: what files of earlier versions were made with.
        alias_of: The option that this is another name of.
        not_in_rows: Why a row of a bulk run cannot say it; empty where it can.
        name: Its key in `Options`, filled in from there, as is the next one.
        kind: Its type.
    """

    help: str
    default: Any = None
    rule: Rule | None = None
    per_scale: bool = False
    commands: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    group: str = "Image"
    is_kept: bool = False
    absent: Any = None
    alias_of: str | None = None
    not_in_rows: str = ""
    name: str = ""
    kind: Any = None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of an option that is one of several words; none otherwise."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def takes_several(self) -> bool:
        """Whether it takes several numbers, as a list or with commas."""
        return self.reads in (int, float) and any(get_origin(kind) is not None for kind in self._kinds)

    @property
    def reads(self) -> type[bool] | type[str] | type[int] | type[float]:
        """What one value of it is read as from a text."""
        kinds = self._kinds
        if bool in kinds:
            return bool
        for kind, read in ((str, str), (SupportsIndex, int), (SupportsFloat, float)):
            if kind in kinds:
                return read
        return str

    def takes(self, kind: object) -> bool:
        """Whether a type is one of those that its declaration names."""
        return kind in self._kinds

    @property
    def _kinds(self) -> tuple[Any, ...]:
        return get_args(self.kind) or (self.kind,)


def _at_least(least: int) -> Rule:
    return Rule(holds=lambda value: is_whole(value) and value >= least, words=f"a whole number, {least} or more")


_TEMPERATURE = Rule(
    holds=lambda value: value > 0 and 1 / value <= MAX_FLOAT32,
    words=f"above {1 / MAX_FLOAT32:.3g}",
    remedy="; top_k=1 always takes the likeliest",
)
_SHARE = Rule(holds=lambda value: 0 <= value <= 1, words="in [0, 1]")
_BUDGET = Rule(holds=lambda value: value is None or (is_number(value) and 0 < value <= 1), words="in (0, 1]")
_MILLISECONDS = Rule(
    holds=lambda value: value is None or (is_number(value) and 0 < value <= MAX_FLOAT32), words="a number above 0"
)
_CALLBACK = Rule(holds=lambda value: value is None or callable(value), words="a function, or None")
_TOP_K = Rule(holds=lambda value: value >= 0 and value == int(value), words="a whole number, 0 or more")


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a call, but for the form of its images."""

    negative_prompt: Annotated[
        str | Sequence[str] | None,
        Option(help="What to avoid; one text for all prompts or one for each.", commands=_SAMPLING),
    ]
    num_images_per_prompt: Annotated[
        SupportsIndex,
        Option(
            help="Images per prompt, one after the other; image j uses the prompt's seed + j.",
            default=1,
            rule=_at_least(1),
            commands=_ONE_CALL,
            flags=("--num-images", "-n"),
        ),
    ]
    seed: Annotated[
        SupportsIndex | Sequence[SupportsIndex] | None,
        Option(help="One seed, or one per prompt with commas: 7,8; default: random.", commands=_ONE_CALL),
    ]
    generator: Annotated[
        "torch.Generator | None",
        Option(
            help='Random state for rng="reference", instead of a seed; it advances.',
            not_in_rows="a table cannot hold a state; use seed",
        ),
    ]
    rng: Annotated[
        Literal["keyed", "reference"],
        Option(
            help="keyed: random numbers depend on seed, scale and position alone; reference: in the order of the "
            "published code, from one seed for all images as one batch.",
            default="keyed",
            commands=_GENERATE,
            is_kept=True,
        ),
    ]
    width: Annotated[
        SupportsIndex | None,
        Option(help="Pixels, together with height; --size WxH. A size that the schedules know.", is_kept=True),
    ]
    height: Annotated[SupportsIndex | None, Option(help="Pixels, together with width; --size WxH.", is_kept=True)]
    aspect_ratio: Annotated[
        str | SupportsFloat | None,
        Option(help="Width to height, such as 4:3 or 1.333, for a size that is not WxH.", is_kept=True),
    ]
    pixels: Annotated[str | None, Option(help="0.06M, 0.25M, 0.60M or 1M pixels; --size 1M.", is_kept=True)]
    guidance_scale: Annotated[
        PerScale | None,
        Option(
            help="How strongly to follow the prompt; 1 is off for Infinity, 0 for VAR, Switti and HART.",
            per_scale=True,
            commands=_SAMPLING,
            is_kept=True,
        ),
    ]
    cfg: Annotated[PerScale | None, Option(help="Alias.", alias_of="guidance_scale")]
    temperature: Annotated[
        PerScale | None,
        Option(help="Divides the logits.", rule=_TEMPERATURE, per_scale=True, commands=_SAMPLING, is_kept=True),
    ]
    tau: Annotated[PerScale | None, Option(help="Alias.", alias_of="temperature")]
    top_k: Annotated[
        SupportsIndex | Sequence[SupportsIndex] | None,
        Option(
            help="Keep the k likeliest values; 0 keeps all, 1 is greedy.",
            rule=_TOP_K,
            per_scale=True,
            commands=_SAMPLING,
            is_kept=True,
        ),
    ]
    top_p: Annotated[
        PerScale | None,
        Option(
            help="Keep the likeliest values up to this share of the mass; 0 keeps all.",
            rule=_SHARE,
            per_scale=True,
            commands=_SAMPLING,
            is_kept=True,
        ),
    ]
    more_smooth: Annotated[
        bool | None,
        Option(
            help="Mix codes instead of choosing them, for softer images (VAR, Switti, HART).",
            commands=_SAMPLING,
            is_kept=True,
            absent=False,
        ),
    ]
    policy: Annotated[
        "str | Path | Policy",
        Option(
            help="Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.",
            default="full",
            commands=_GENERATE,
            flags=("--policy", "-p"),
            group="Policy",
            is_kept=True,
        ),
    ]
    budget: Annotated[
        SupportsFloat | None,
        Option(
            help="Share of the full run's FLOPs to spend: fits the dial of the policy, or of fovea without one.",
            rule=_BUDGET,
            commands=_GENERATE,
            group="Policy",
        ),
    ]
    latency_budget_ms: Annotated[
        SupportsFloat | None,
        Option(
            help="Milliseconds that the call should take: fits the policy and lets later scales step down. Needs a "
            "profile of this machine: foveate bench calibrate.",
            rule=_MILLISECONDS,
            commands=_ONE_CALL,
            group="Policy",
            not_in_rows="a clock would decide what the image is; use budget",
        ),
    ]
    batch_invariant: Annotated[
        bool,
        Option(
            help="Make every image bitwise equal to one generated alone. Always so on a CPU; slower on a GPU.",
            default=False,
            commands=_GENERATE,
            is_kept=True,
            not_in_rows="it is for the whole run",
        ),
    ]
    trace: Annotated[
        bool,
        Option(
            help="Also record what ran where; written as JSON and as a compute map over each image.",
            default=False,
            commands=_ONE_CALL,
            group="Output",
            not_in_rows="a run writes images and a manifest",
        ),
    ]
    callback_on_step_end: Annotated[
        StepCallback | None,
        Option(
            help="Called after every scale; may raise Cancelled to stop.",
            rule=_CALLBACK,
            not_in_rows="a table cannot hold a function",
        ),
    ]


class Options(CallOptions, total=False):
    """Keyword arguments of a call."""

    output_type: Annotated[
        OutputType,
        Option(
            help="pil images; np uint8 (n, height, width, 3); pt float32 in [0, 1], (n, 3, height, width); latent "
            "float32 latents, not decoded.",
            default="pil",
            not_in_rows="a run writes images of one format",
        ),
    ]


def _declared() -> dict[str, Option]:
    found = {}
    for name, annotation in Options.__annotations__.items():
        kind, option = get_args(annotation)
        found[name] = replace(option, name=name, kind=kind)
    return found


OPTIONS: Mapping[str, Option] = _declared()
"""Every option by name."""


def checked(options: Options) -> Options:
    """All options of a call: what was given, checked, aliases under the names that they stand for, and defaults.

    Raises:
        FoveateError: There is no such option (the closest is named), or a value that no model could take.
    """
    for name in options:
        if name not in OPTIONS:
            raise unknown_option(name, OPTIONS)
    found: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()} | dict(options)
    for name, option in OPTIONS.items():
        value = found[name]
        if (rule := _rule_of(option)) is not None:
            rule.refuse(name, value)
        if option.reads is bool and value is not None:
            found[name] = bool(value)
        if option.alias_of is not None and found.pop(name) is not None:
            if found[option.alias_of] is not None:
                raise FoveateError(f"give {option.alias_of} or its alias {name}, not both")
            found[option.alias_of] = value
    call = cast(Options, found)
    _refuse_contradictions(call)
    return call


def _rule_of(option: Option) -> Rule | None:
    """The rule of a whole value; those of single scales need the model's schedule."""
    if option.choices:
        return _choice(option)
    if option.reads is bool:
        return _switch(option)
    return None if option.per_scale else option.rule


def _choice(option: Option) -> Rule:
    words = " or ".join(option.choices) if len(option.choices) == 2 else f"one of {', '.join(option.choices)}"  # noqa: PLR2004
    return Rule(holds=lambda value: isinstance(value, str) and value in option.choices, words=words)


def _switch(option: Option) -> Rule:
    words = "True or False" if option.default is not None else "True, False or None"
    return Rule(
        holds=lambda value: _is_switch(value) or (value is None and option.default is None),
        words=words,
    )


def _is_switch(value: object) -> bool:
    """Whether it is a bool, or one of NumPy's, which is no subclass."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _refuse_contradictions(call: Options) -> None:
    sides, generator, is_reference = (call["width"], call["height"]), call["generator"], call["rng"] == "reference"
    has_shape = call["aspect_ratio"] is not None or call["pixels"] is not None
    for is_wrong, message in (
        (not all(side is None or is_whole(side) for side in sides), f"width and height are pixels, got {sides}"),
        ((sides[0] is None) != (sides[1] is None), "give both height and width, or an aspect_ratio"),
        (sides[1] is not None and has_shape, "give height and width or aspect_ratio and pixels, not both"),
        (generator is not None and not is_reference, 'generator needs rng="reference"; use seed with rng="keyed"'),
        (generator is not None and call["seed"] is not None, "give a seed or a generator, not both"),
        (is_reference and call["batch_invariant"], 'batch_invariant needs rng="keyed"'),
        (
            call["budget"] is not None and call["latency_budget_ms"] is not None,
            "give a budget or a latency_budget_ms, not both",
        ),
    ):
        if is_wrong:
            raise FoveateError(message)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a float or an int, or one of NumPy's."""
    return isinstance(value, Real)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int, or one of NumPy's, which behave alike."""
    return isinstance(value, Integral)


def finite(name: str, value: object) -> float:
    """A number of any library that float32 can hold, as that is what it is multiplied with; a text does not count.

    Raises:
        FoveateError: It is not such a number.
    """
    if isinstance(value, SupportsFloat):
        # An array of several numbers only looks like one, and an integer may be larger than any float.
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(value)
            if abs(number) <= MAX_FLOAT32:
                return number
    raise FoveateError(f"{name} must be finite numbers in float32, at most {MAX_FLOAT32:.3g}, got {value!r}")
