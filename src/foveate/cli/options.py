"""Flags that several commands share, as frozen records; ranges are checked where the values are used.

Those of a call come from the declarations of its options.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from cyclopts import Group, Parameter

from foveate.core.errors import FoveateError
from foveate.core.schedule import BUDGETS
from foveate.pipeline.option_texts import names_of, numbers, read_size
from foveate.pipeline.options import OPTIONS, Option, Options

C = TypeVar("C")

GROUPS = tuple(
    Group.create_ordered(name)
    for name in ("Image", "Policy", "Measurement", "Server", "Limits", "Output", "Model", "Dtypes", "Machine")
)
"""Groups of flags, in the order in which help shows them."""
PICTURE, POLICY, MEASUREMENT, SERVER, LIMITS, OUTPUT, MODEL, FORMATS, MACHINE = GROUPS

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "fp8"]
PolicyFlag = Annotated[str, Parameter(name=["--policy", "-p"], group=POLICY)]
JsonFlag = Annotated[bool, Parameter(name="--json", group=OUTPUT)]
QuietFlag = Annotated[bool, Parameter(name=["--quiet", "-q"], group=OUTPUT)]
ConfigFlag = Annotated[Path | None, Parameter(group=OUTPUT)]


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which model runs, and on what.

    Attributes:
        model: A name from foveate models, a folder, a file of transformer weights, or owner/name on the hub.
        autoencoder: File of the autoencoder's weights, where it does not lie beside the transformer.
        text_encoder: Folder or hub repository of the text encoder, instead of the published one.
        weights: random: the same architecture with random weights.
        revision: Revision of a model from a hub.
        local_files_only: Never use the network.
        dtype: Dtype of the model, whatever its files hold.
        decoder_dtype: Dtype of the decoder; default: --dtype.
        quantization: Hold the weights of the blocks in int8 or fp8: less memory, same time. Needs the extra quantize.
        device: Where it runs, such as cpu or cuda:0; default: cpu.
        threads: CPU threads; default: torch's choice.
        offload: Keep only the module in use on the device, the others in main memory.
        release_text_encoder: Hold the text encoder in memory only while prompts are encoded.
        cuda_graphs: Capture the first scales as CUDA graphs; untested on a GPU.
        kernels: triton runs Triton kernels on a GPU, plain torch where they fail; untested on a GPU.
    """

    model: Annotated[str, Parameter(name=["--model", "-m"])] = "emoji"
    autoencoder: Path | None = None
    text_encoder: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    revision: str | None = None
    local_files_only: bool = False
    dtype: Annotated[Dtype, Parameter(group=FORMATS)] = "float32"
    decoder_dtype: Annotated[Dtype | None, Parameter(group=FORMATS)] = None
    quantization: Annotated[Quantization | None, Parameter(group=FORMATS)] = None
    device: Annotated[str | None, Parameter(group=MACHINE)] = None
    threads: Annotated[int | None, Parameter(group=MACHINE)] = None
    offload: Annotated[bool, Parameter(group=MACHINE)] = False
    release_text_encoder: Annotated[bool, Parameter(group=MACHINE)] = False
    cuda_graphs: Annotated[bool, Parameter(group=MACHINE)] = False
    kernels: Annotated[Literal["triton"] | None, Parameter(group=MACHINE)] = None


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class SizeOptions:
    """How large the images are; by default the model's own size.

    Attributes:
        size: 0.06M, 0.25M, 0.60M or 1M pixels, or WxH such as 256x256; default: the model's own.
        aspect_ratio: Width to height, such as 4:3, for a size that is not WxH.
    """

    size: Annotated[str | None, Parameter(alias="--pixels")] = None
    aspect_ratio: str | None = None

    def options(self) -> Options:
        """The size as the pipeline takes it.

        Raises:
            FoveateError: As `width_and_height`.
        """
        width, height = self.width_and_height() or (None, None)
        return Options(width=width, height=height, aspect_ratio=self.aspect_ratio, pixels=self.pixels)

    @property
    def pixels(self) -> str | None:
        """The pixel budget, or None if the size is not one."""
        budget = (self.size or "").upper()
        return budget if budget in BUDGETS else None

    def width_and_height(self) -> tuple[int, int] | None:
        """The size in pixels, or None if none was asked for.

        Raises:
            FoveateError: It is neither a budget nor WxH, or is WxH and comes together with an aspect ratio.
        """
        if self.size is None or self.pixels is not None:
            return None
        sides = read_size(self.size)
        if self.aspect_ratio is not None:
            raise FoveateError(f"--size {self.size} already fixes the image size; leave out --aspect-ratio")
        return cast(tuple[int, int], (sides["width"], sides["height"]))


def ignored(records: Iterable[tuple[Any, Any]], fit: Collection[str]) -> list[str]:
    """Flags that were given and do not fit; each record of flags comes with its default, `fit` names fields."""
    return [
        _flag(field.name)
        for given, default in records
        for field in fields(given)
        if field.name not in fit and getattr(given, field.name) != getattr(default, field.name)
    ]


def _flag(name: str) -> str:
    return names_of(OPTIONS[name])[0] if name in OPTIONS else f"--{name.replace('_', '-')}"


def _flags_of(command: str) -> Callable[[type[C]], type[C]]:
    """Makes a class the record of the options that a command has as flags."""

    def build(record: type[C]) -> type[C]:
        found = [option for option in OPTIONS.values() if command in option.commands]
        record.__annotations__ = {option.name: Annotated[_kind(option), _parameter(option)] for option in found}
        for option in found:
            setattr(record, option.name, option.default)
        return Parameter(name="*", group=PICTURE)(dataclass(frozen=True, kw_only=True)(record))

    return build


def _kind(option: Option) -> Any:  # noqa: ANN401 - a type for cyclopts to read
    """What a flag is read as; numbers that may be several stay texts, as commas stand between them."""
    if option.choices or option.reads is bool:
        return option.kind
    if option.takes_several:
        return list[str] | None
    return option.reads if option.default is not None else option.reads | None


def _parameter(option: Option) -> Parameter:
    (group,) = (group for group in GROUPS if group.name == option.group)
    switch = f"--no-{option.name.replace('_', '-')}"
    return Parameter(
        name=names_of(option),
        group=group,
        help=option.help + (" Or one per scale, with commas." if option.per_scale else ""),
        # A switch that the model may have on needs a way to turn it off.
        negative=switch if option.reads is bool and option.default is None else (),
    )


def _value(option: Option, value: Any) -> Any:  # noqa: ANN401 - of whatever kind the option is
    if option.takes_several:
        return numbers(names_of(option)[0], value, int if option.reads is int else float)
    return value


@_flags_of("generate")
class GenerateFlags:
    """Options of a call that `foveate generate` has as flags, one field for each."""


@_flags_of("batch")
class BatchFlags:
    """Options of a call that `foveate batch` has as flags, for rows that say nothing else."""


@_flags_of("compare")
class CompareFlags:
    """Options of a call that `foveate compare` has as flags, for both sides."""


def options_of(flags: GenerateFlags | BatchFlags | CompareFlags) -> Options:
    """The options of a call as the pipeline takes them.

    Raises:
        FoveateError: A flag that takes numbers has something else.
    """
    return cast(Options, {name: _value(OPTIONS[name], value) for name, value in vars(flags).items()})
