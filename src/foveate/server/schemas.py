"""Bodies and events of the HTTP API, as pydantic models: what is read is strict, what is sent is documented by them.

Fields of OpenAI's images API have its names and meanings; ours stand beside them at the top level. A field that there
is not is refused with the nearest name. Values of ours are checked where the options of a call are declared.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from foveate.pipeline.options import OPTIONS
from foveate.policies.registry import MAX_SPEC
from foveate.server.work import MOST_PARTIALS

Quality = Literal["auto", "high", "hd", "medium", "standard", "low"]
OutputFormat = Literal["png", "jpeg", "webp"]

_SPEC = "a name, or a spec such as skip-scales:count=2; see /v1/policies. Never a path"
_PROMPT = "a red apple"


def _option(name: str) -> Any:  # noqa: ANN401 - a default of pydantic's
    """A field that the options of a call declare; None takes the model's default."""
    option = OPTIONS[name]
    return Field(default=None, description=option.help + (" Or one per scale." if option.per_scale else ""))


T = TypeVar("T")
_PerScale = Annotated[list[T], Field(max_length=64, fail_fast=True)]
"""Values of a field for every scale; the first wrong one ends the check, as each would make an error of its own."""


class _Call(BaseModel):
    """What generating images and comparing policies have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="What to generate.", examples=[_PROMPT])
    model: str | None = Field(default=None, description="The loaded model's name, see /v1/models; default: that one.")
    size: str | None = Field(
        default=None, description="WIDTHxHEIGHT, see /v1/sizes, or auto for the model's own.", examples=["auto"]
    )
    output_format: OutputFormat | None = Field(default=None, description="Default: png.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100; default: 95. None for png."
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events while images form.")
    partial_images: int | None = Field(
        default=None, ge=0, le=MOST_PARTIALS, description="Coarse images of each image that a stream sends before it."
    )
    user: str | None = Field(default=None, max_length=256, description="Whose request it is; for the log alone.")
    safety_identifier: str | None = Field(default=None, max_length=256, description="As user.")
    seed: int | None = Field(
        default=None,
        description="0 is 0; image j uses seed + j; default: random, and said in the answer.",
        examples=[7],
    )
    negative_prompt: str | None = _option("negative_prompt")
    guidance_scale: float | _PerScale[float] | None = _option("guidance_scale")
    temperature: float | _PerScale[float] | None = _option("temperature")
    top_k: int | _PerScale[int] | None = _option("top_k")
    top_p: float | _PerScale[float] | None = _option("top_p")
    more_smooth: bool | None = _option("more_smooth")
    trace: bool | None = Field(
        default=None,
        description="With stream: also events of ours, one per scale with its image and the depth of every token.",
    )


class ImageRequest(_Call):
    """One prompt, n images: OpenAI's body of `POST /v1/images/generations`, and our fields."""

    n: int | None = Field(default=None, ge=1, description="Images; that many come, or none. Default: 1.")
    response_format: Literal["b64_json", "url"] | None = Field(
        default=None, description="Images in the body, or urls of this server that expire; default: b64_json."
    )
    quality: Quality | None = Field(
        default=None,
        description="auto, high, hd: the full run; medium, standard: preset-balanced; low: preset-draft.",
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        default=None, description="Images are opaque; transparent is refused."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description="Ignored, with a warning.")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="Ignored, with a warning.")
    policy: str | None = Field(
        default=None,
        max_length=MAX_SPEC,
        description=f"Decides how much runs, instead of quality: {_SPEC}.",
        examples=["preset-faithful"],
    )
    budget: float | None = _option("budget")
    latency_budget_ms: float | None = Field(
        default=None, description="Milliseconds from acceptance to answer; what comes behind them is on_late."
    )
    on_late: Literal["coarse", "error"] | None = Field(
        default=None,
        description="Behind the budget: the coarse image of the latest finished scale (default), or an error.",
    )


class CompareRequest(_Call):
    """One prompt and seed under two policies: the body of `POST /v1/images/compare`."""

    policy_a: str = Field(max_length=MAX_SPEC, description=f"Of side a: {_SPEC}.", examples=["preset-draft"])
    policy_b: str = Field(
        default="full", max_length=MAX_SPEC, description="Of side b, which side a is measured against."
    )


class Run(BaseModel):
    """What ran, beside the full run."""

    run: int
    full: int


class Milliseconds(BaseModel):
    """Wall-clock time; `queue` is the wait for the first scale, and `total` begins behind it."""

    text: float
    transformer: float
    decoder: float
    total: float
    queue: float


class WarningInfo(BaseModel):
    """A stable code, and a line for people that says what to do."""

    code: str
    message: str


class PolicyInfo(BaseModel):
    """A policy as it ran."""

    spec: str = Field(examples=["full"])
    fingerprint: str


class ScaleInfo(BaseModel):
    """One scale of an image; `grid` is rows and columns of tokens, `ms` its share of the batch that it ran in."""

    scale: int
    grid: tuple[int, int]
    ms: float
    tokens: Run


class ImageInfo(BaseModel):
    """How an image was made; `command` and `curl` make it again. `scales` are those that ran."""

    seed: int
    policy: PolicyInfo
    ms: Milliseconds
    flops: Run
    tokens: Run
    scales: list[ScaleInfo]
    warnings: list[WarningInfo]
    is_coarse: bool = Field(description="The latest finished scale at a deadline, not the finished image.")
    command: str
    curl: str


class InputDetails(BaseModel):
    """Tokens of the input."""

    image_tokens: int = 0
    text_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt as the model read it, and of the images, over all their scales that ran."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    total_tokens: int


class ImageData(BaseModel):
    """One image, as `response_format` asked."""

    b64_json: str | None = None
    url: str | None = None


class CallInfo(BaseModel):
    """What holds for all images of an answer; `images` has one entry for each of them."""

    id: str
    model: str
    policy: PolicyInfo
    warnings: list[WarningInfo]
    images: list[ImageInfo]


class ImagesReply(BaseModel):
    """OpenAI's answer, and `foveate`."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: str | None
    size: str
    usage: Usage
    foveate: CallInfo


class Fidelity(BaseModel):
    """Side a measured against side b: PSNR in dB, at most 100, and SSIM; `flops_ratio` is a over b."""

    psnr: float
    ssim: float
    identical: bool
    flops_ratio: float


class SideReply(BaseModel):
    """One image of a comparison."""

    b64_json: str
    foveate: ImageInfo


class CompareReply(BaseModel):
    """Both images of one seed, and how far they are apart."""

    created: int
    id: str
    model: str
    seed: int
    output_format: OutputFormat
    size: str
    a: SideReply
    b: SideReply
    fidelity: Fidelity


class ErrorInfo(BaseModel):
    """OpenAI's error: for people, for programs, and the field that it is about."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["size"])
    code: str | None = Field(examples=["invalid_value"])


class ErrorReply(BaseModel):
    """The envelope of every error."""

    error: ErrorInfo


class _Event(BaseModel):
    """Of a stream; a comparison says which side it is of."""

    side: Literal["a", "b"] | None = None


class AcceptedEvent(_Event):
    """First of a stream with trace: what was accepted, and how many requests are before it."""

    type: Literal["foveate.accepted"] = "foveate.accepted"
    id: str
    seeds: list[int]
    size: str
    model: str
    policy: PolicyInfo
    position: int
    num_scales: int
    warnings: list[WarningInfo]


class QueueEvent(_Event):
    """With trace: how many requests are served before this one, whenever that changes."""

    type: Literal["foveate.queue"] = "foveate.queue"
    position: int


class DepthMap(BaseModel):
    """Blocks that each token ran: h * w bytes, row by row, as base64."""

    b64: str
    num_blocks: int


class ScaleEvent(_Event):
    """With trace: a finished scale and its image, a JPEG of full size; `company` counts images that ran with it."""

    type: Literal["foveate.scale"] = "foveate.scale"
    image_index: int
    scale: int
    num_scales: int
    grid: tuple[int, int]
    ms: float
    company: int
    tokens: Run
    flops: Run
    b64_json: str | None
    depth: DepthMap | None


class _ImageEvent(_Event):
    """OpenAI's event with an image, and which image of the request it is."""

    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    quality: str
    size: str
    image_index: int


class PartialImageEvent(_ImageEvent):
    """A real coarse image: the latent behind an earlier scale, decoded."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """A finished image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage
    foveate: ImageInfo


class ComparedEvent(BaseModel):
    """Last of a comparison."""

    type: Literal["foveate.compared"] = "foveate.compared"
    fidelity: Fidelity


class ErrorEvent(BaseModel):
    """Ends a stream."""

    type: Literal["error"] = "error"
    error: ErrorInfo


class ModelInfo(BaseModel):
    """OpenAI's entry of a model, and what it was trained on."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    foveate: dict[str, Any] = Field(description="Family, weights, dtype, default size, scales and sampling defaults.")


class ModelList(BaseModel):
    """The loaded model."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class SizeInfo(BaseModel):
    """One possible size; `is_trained` says whether the model has seen images of it."""

    size: str = Field(examples=["256x256"])
    width: int
    height: int
    aspect_ratio: str
    pixels: str
    grids: list[tuple[int, int]] = Field(description="Rows and columns of tokens of every scale.")
    num_scales: int
    tokens: int = Field(description="Of all scales of one image.")
    is_default: bool
    is_trained: bool
    is_allowed: bool = Field(description="Within the limit on pixels of this server.")


class SizeList(BaseModel):
    """Every size, the smallest first."""

    object: Literal["list"] = "list"
    data: list[SizeInfo]


class FieldInfo(BaseModel):
    """A field of a policy."""

    name: str
    type: str
    default: Any


class PolicyEntry(BaseModel):
    """A policy or a preset; `is_measured` says whether a preset's bound was measured on the loaded weights."""

    name: str
    title: str
    details: str
    fields: list[FieldInfo]
    spec: str
    is_possible: bool = Field(description="Whether it fits the scales of the model's default size.")
    reason: str | None = Field(default=None, description="Why not.")
    bound: list[str] | None = Field(default=None, description="What a preset keeps, as measured.")
    measured_on: str | None = None
    is_measured: bool | None = None


class PolicyList(BaseModel):
    """What decides how much of the model runs."""

    object: Literal["list"] = "list"
    data: list[PolicyEntry]
    presets: list[PolicyEntry]


class Health(BaseModel):
    """The process is alive."""

    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """Whether requests are taken, and which kernels run."""

    status: Literal["ready", "loading", "closing"]
    model: str | None = None
    kernels: str | None = None
    warnings: list[WarningInfo] = []


class Version(BaseModel):
    """Of what runs."""

    foveate: str
    torch: str
    python: str
