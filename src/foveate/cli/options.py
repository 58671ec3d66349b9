"""Flags that several commands share, as frozen records; ranges are checked where the values are used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from cyclopts import Parameter

from foveate.core.errors import FoveateError

Number = TypeVar("Number", int, float)

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "fp8"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Which model runs, and on what.

    Attributes:
        model: A name from foveate models, a folder, a file of transformer weights, or owner/name on the hub.
        autoencoder: File of the autoencoder's weights, where it does not lie beside the transformer.
        text_encoder: Folder or hub repository of the text encoder, instead of the published one.
        weights: random runs the same architecture with weights drawn at random.
        dtype: What the model computes in, whatever its files hold.
        decoder_dtype: What the decoder computes in, if not in that.
        quantization: Hold the weights of the blocks in eight bits: less memory, no less time. Needs the extra quantize.
        fp8_scales: Multiply in eight bits at so many of the last scales: faster on GPUs from Ada and Hopper on.
        device: Where it runs, such as cpu or cuda:0.
        threads: Threads of the processor; by default what torch chooses.
        revision: Revision of a model from a hub.
        local_files_only: Never reach for the network.
        offload: Hold only the part that works on the device, and the others in main memory.
        release_text_encoder: Hold the text encoder in memory only while prompts are encoded.
        cuda_graphs: On a GPU, replay the first scales of calls of one shape with one launch each.
    """

    model: Annotated[str, Parameter(name=["--model", "-m"])] = "emoji"
    autoencoder: Path | None = None
    text_encoder: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    dtype: Dtype = "float32"
    decoder_dtype: Dtype | None = None
    quantization: Quantization | None = None
    fp8_scales: int = 0
    device: str = "cpu"
    threads: int | None = None
    revision: str | None = None
    local_files_only: bool = False
    offload: bool = False
    release_text_encoder: bool = False
    cuda_graphs: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class SizeOptions:
    """How large the pictures are; by default the model's own size.

    Attributes:
        size: Width and height in pixels, such as 256x256.
        aspect_ratio: Width to height, such as 4:3.
        pixels: Budget of pixels, such as 0.25M.
    """

    size: str | None = None
    aspect_ratio: str | None = None
    pixels: str | None = None

    def width_and_height(self) -> tuple[int, int] | None:
        """The size in pixels, or None if none was asked for.

        Raises:
            FoveateError: It is not written WxH, or comes together with an aspect ratio or budget.
        """
        if self.size is None:
            return None
        if self.aspect_ratio is not None or self.pixels is not None:
            raise FoveateError("--size already fixes the picture; leave out --aspect-ratio and --pixels")
        width, _, height = self.size.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise FoveateError(f"--size must be WIDTHxHEIGHT in pixels, such as 256x256, got {self.size!r}")
        return int(width), int(height)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How symbols are drawn; by default as the model's family does.

    Attributes:
        seed: First seed of every prompt, or one seed per prompt (several, or with commas).
        guidance_scale: The family's cfg; several values, or with commas, are one per scale.
        temperature: Divides the logits; one value, or one per scale.
        top_k: Keep only so many candidates; one value, or one per scale.
        top_p: Keep only candidates up to this probability; one value, or one per scale.
        negative_prompt: What to stay away from.
        more_smooth: Mix codes instead of choosing them, for softer pictures (VAR and Switti).
    """

    seed: list[str] | None = None
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
