"""Flags that several commands share, as frozen records; ranges are checked where the values are used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cyclopts import Group, Parameter

from foveate.core.errors import FoveateError
from foveate.core.schedule import BUDGETS

Number = TypeVar("Number", int, float)

PICTURE, POLICY, MEASUREMENT, OUTPUT, MODEL, FORMATS, MACHINE = (
    Group.create_ordered(name)
    for name in ("Picture", "Policy", "Measurement", "Output", "Model", "Number formats", "Machine")
)
"""Groups of flags, in the order in which help shows them."""

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
        weights: random runs the same architecture with weights drawn at random.
        revision: Revision of a model from a hub.
        local_files_only: Never reach for the network.
        dtype: Number format of the model, whatever its files hold.
        decoder_dtype: Number format of the decoder; default: --dtype.
        quantization: Hold the weights of the blocks in eight bits: less memory, no less time. Needs the extra quantize.
        device: Where it runs, such as cpu or cuda:0; default: cpu.
        threads: Threads of the processor; default: what torch chooses.
        offload: Hold only the part that works on the device, and the others in main memory.
        release_text_encoder: Hold the text encoder in memory only while prompts are encoded.
        cuda_graphs: Capture the first scales as CUDA graphs; untested on a GPU.
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


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class SizeOptions:
    """How large the pictures are; by default the model's own size.

    Attributes:
        size: 0.06M, 0.25M, 0.60M or 1M pixels, or WxH such as 256x256; default: the model's own.
        aspect_ratio: Width to height, such as 4:3, for a size that is not WxH.
    """

    size: Annotated[str | None, Parameter(alias="--pixels")] = None
    aspect_ratio: str | None = None

    @property
    def pixels(self) -> str | None:
        """The budget of pixels, or None if the size is none."""
        budget = (self.size or "").upper()
        return budget if budget in BUDGETS else None

    def width_and_height(self) -> tuple[int, int] | None:
        """The size in pixels, or None if none was asked for.

        Raises:
            FoveateError: It is neither a budget nor WxH, or is WxH and comes together with an aspect ratio.
        """
        if self.size is None or self.pixels is not None:
            return None
        width, _, height = self.size.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise FoveateError(
                f"--size must be one of {', '.join(BUDGETS)}, or WIDTHxHEIGHT in pixels, got {self.size!r}"
            )
        if self.aspect_ratio is not None:
            raise FoveateError(f"--size {self.size} already fixes the picture; leave out --aspect-ratio")
        return int(width), int(height)


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How symbols are drawn; by default as the model's family does.

    Attributes:
        guidance_scale: How strongly to follow the prompt; 1 is off for Infinity, 0 for VAR and Switti. Or one per scale
        temperature: Divides the logits. Or one per scale, with commas.
        top_k: Keep the k likeliest values; 0 keeps all. Or one per scale, with commas.
        top_p: Keep the likeliest values up to this share of the mass; 0 keeps all. Or one per scale, with commas.
        negative_prompt: What to stay away from.
        more_smooth: Mix codes instead of choosing them, for softer pictures (VAR and Switti).
    """

    guidance_scale: Annotated[list[str] | None, Parameter(name=["--guidance-scale", "--cfg"])] = None
    temperature: Annotated[list[str] | None, Parameter(name=["--temperature", "--tau"])] = None
    top_k: list[str] | None = None
    top_p: list[str] | None = None
    negative_prompt: str | None = None
    more_smooth: Annotated[bool | None, Parameter(negative="--no-more-smooth")] = None


def numbers(flag: str, texts: list[str] | None, kind: Callable[[str], Number]) -> Number | list[Number] | None:
    """The values of a flag that takes one number or several: one alone as itself, several as a list.

    Raises:
        FoveateError: One of them is no such number.
    """
    if texts is None:
        return None
    values: list[Number] = []
    for text in ",".join(texts).split(","):
        try:
            values.append(kind(text))
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise FoveateError(f"{flag} must be {what}, or several with commas, got {text!r}") from None
    return values[0] if len(values) == 1 else values
