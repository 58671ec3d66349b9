"""From the body of a request to work for the scheduler; whatever is refused names its field.

What an option of a call may be is checked where it is declared (`pipeline.options`, `Pipeline.job`); here stand only
OpenAI's fields, and the limits of this server. It may take tens of milliseconds and runs in worker threads.
"""

import math
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from foveate.core.errors import FoveateError
from foveate.pipeline.call import Job, warnings_of
from foveate.pipeline.deadline import Ladder
from foveate.pipeline.encoding import DEFAULT_QUALITY, Encoder, fits_jpeg, prompt_bytes
from foveate.pipeline.options import OPTIONS, Options
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_spec
from foveate.server.errors import ApiError
from foveate.server.limits import Limits
from foveate.server.schemas import CompareRequest, ImageRequest, WarningInfo
from foveate.server.settings import ServerSettings
from foveate.server.work import Work

Body = ImageRequest | CompareRequest
Side = Literal["a", "b"]

QUALITIES = {
    "auto": ("full", "high"), "high": ("full", "high"), "hd": ("full", "high"),
    "medium": ("preset-balanced", "medium"), "standard": ("preset-balanced", "medium"),
    "low": ("preset-draft", "low"),
}  # fmt: skip
"""The policy of a quality, and its name in answers."""

_OWN = ("negative_prompt", "guidance_scale", "temperature", "top_k", "top_p", "more_smooth", "budget")
"""Options of a call that are fields of the same name."""

_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")
_RANDOM_SEEDS = 2**32
_NAMED_SIZES = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """A request that was checked, or one side of a comparison.

    `num_blocks` are those of the model. `quality` is its name in answers, None where a policy was asked for; `warnings`
    are known before anything runs.
    """

    body: Body
    work: Work
    encoder: Encoder
    model: str
    num_blocks: int
    quality: str | None = None
    warnings: tuple[WarningInfo, ...] = ()
    side: Side | None = None

    @property
    def job(self) -> Job:
        """The call."""
        return self.work.job

    @property
    def size(self) -> str:
        """In pixels, as OpenAI writes it."""
        return f"{self.job.kept['width']}x{self.job.kept['height']}"


def asked_of(body: ImageRequest, pipe: Pipeline, settings: ServerSettings, owner: str) -> Asked:
    """Checks a request for images.

    Raises:
        ApiError: A field is refused.
        FoveateError: An option is; its message begins with its name.
    """
    _check_openai(body)
    limits, count = settings.limits, 1 if body.n is None else body.n
    _require(count <= limits.images, f"n must be 1 to {limits.images}, got {count}; send several requests", "n")
    kept = settings.store.images
    message = f"n must be 1 to {kept} with urls, as this server keeps {kept} images, got {count}; ask for b64_json"
    _require(body.response_format != "url" or count <= kept, message, "n")
    encoder = _checked_encoder(body, pipe, settings)
    spec, quality = _policy_of(body)
    options = {**_options(body, pipe, limits), "num_images_per_prompt": count, "policy": spec, "seed": body.seed}
    with about("latency_budget_ms"):
        rule = OPTIONS["latency_budget_ms"].rule
        assert rule is not None, "it is declared with one"
        rule.refuse("latency_budget_ms", body.latency_budget_ms)
    job = _job(body, options, pipe, limits)
    ignored = [name for name in ("style", "moderation") if getattr(body, name) is not None]
    notes = [WarningInfo(code=f"{name}_ignored", message=f"{name} has no effect here") for name in ignored]
    if body.latency_budget_ms is not None:
        job, found = _stepping(job, body, options, pipe, limits)
        notes += found
    return Asked(
        body=body,
        work=_work(body, job, owner, budget_ms=body.latency_budget_ms, on_late=body.on_late or "coarse"),
        encoder=encoder,
        model=pipe.model.spec.name,
        num_blocks=pipe.model.transformer.shape.num_blocks,
        quality=quality,
        warnings=(*notes, *_known_warnings(job, pipe)),
    )


def sides_of(body: CompareRequest, pipe: Pipeline, settings: ServerSettings, owner: str) -> tuple[Asked, Asked]:
    """Checks a comparison; both sides have one seed.

    Raises:
        ApiError: A field is refused.
        FoveateError: As `asked_of`.
    """
    _check_stream(body)
    encoder = _checked_encoder(body, pipe, settings)
    seed = secrets.randbelow(_RANDOM_SEEDS) if body.seed is None else body.seed
    options, found = _options(body, pipe, settings.limits), []
    for side, spec in (("a", body.policy_a), ("b", body.policy_b)):
        with about(f"policy_{side}"):
            load_spec(spec)
        job = _job(body, {**options, "policy": spec, "seed": seed}, pipe, settings.limits, f"policy_{side}")
        warnings = _known_warnings(job, pipe)
        work = _work(body, job, owner)
        found.append(
            Asked(
                body=body,
                work=work,
                encoder=encoder,
                model=pipe.model.spec.name,
                num_blocks=pipe.model.transformer.shape.num_blocks,
                warnings=warnings,
                side=cast(Side, side),
            )
        )
    return found[0], found[1]


@contextmanager
def about(param: str) -> Iterator[None]:
    """Says of which field an error is.

    Raises:
        ApiError: In place of any error with a remedy.
    """
    try:
        yield
    except FoveateError as error:
        raise ApiError(400, str(error), param=param) from None


def _check_openai(body: ImageRequest) -> None:
    """Refuses values of OpenAI's fields that nothing here can do, and fields that contradict each other."""
    _check_stream(body)
    _require(body.background != "transparent", "images are opaque here; leave background out", "background")
    _require(
        not (body.stream and body.response_format == "url"),
        "a stream carries its images; leave response_format or stream out",
        "response_format",
    )
    _require(
        body.on_late is None or body.latency_budget_ms is not None,
        "on_late needs a latency_budget_ms; add one, or leave it out",
        "on_late",
    )


def _check_stream(body: Body) -> None:
    _require(bool(body.stream) or not body.partial_images, "partial_images needs stream: true", "partial_images")
    _require(bool(body.stream) or not body.trace, "trace needs stream: true", "trace")


def _checked_encoder(body: Body, pipe: Pipeline, settings: ServerSettings) -> Encoder:
    """The encoder, after the checks that need no model but its name."""
    names = (pipe.model.spec.name, *settings.aliases)
    if body.model is not None and body.model not in names:
        message = f"no model {body.model[:80]!r} here; there is {', '.join(dict.fromkeys(names))}"
        raise ApiError(404, message, param="model", code="model_not_found")
    most = settings.limits.prompt_chars
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(body, name) or "")
        message = f"{name} must have {most} characters or less, got {length}"
        _require(length <= most, message, name, "string_above_max_length")
    kind, quality = body.output_format or "png", body.output_compression
    with about("output_compression" if quality is not None else "output_format"):
        # Pillow's scale begins at 1.
        asked = None if quality is None else max(1, quality)
        encoder = Encoder(format=kind, quality=DEFAULT_QUALITY if asked is None and kind != "png" else asked)
    fits = kind != "jpeg" or fits_jpeg([prompt_bytes(body.prompt, body.negative_prompt)])
    _require(fits, "the prompts are too long to be stored in a jpeg; ask for png or webp", "output_format")
    return encoder


def _policy_of(body: ImageRequest) -> tuple[str, str | None]:
    """The spec of a policy, and the quality that answers name."""
    is_own = body.policy is not None or body.budget is not None
    _require(
        not (is_own and body.quality not in (None, "auto")),
        "give quality, or policy and budget, not both",
        "quality",
    )
    if is_own:
        spec = "full" if body.policy is None else body.policy
        with about("policy"):
            load_spec(spec)
        return spec, None
    return QUALITIES[body.quality or "auto"]


def _options(body: Body, pipe: Pipeline, limits: Limits) -> dict[str, Any]:
    """The options that bodies of both endpoints have, as a call takes them."""
    size = None if body.size is None or body.size == "auto" else _SIZE.fullmatch(body.size)
    if body.size is not None and body.size != "auto":
        message = f"size must be WIDTHxHEIGHT in pixels, such as {_some_sizes(pipe, limits)}, or auto"
        _require(size is not None, f"{message}, got {body.size[:80]!r}; /v1/sizes lists all", "size")
    found = {name: getattr(body, name, None) for name in _OWN}
    if size is not None:
        found |= {"width": int(size[1]), "height": int(size[2])}
    found["trace"] = bool(body.trace)
    return {name: value for name, value in found.items() if value is not None}


def _some_sizes(pipe: Pipeline, limits: Limits) -> str:
    """The default size and those nearest to it, as far as this server allows them."""
    spec = pipe.model.spec
    rows, columns = spec.default_schedule.grids[-1]
    home = (columns * spec.stride, rows * spec.stride)
    allowed = [size for size in spec.sizes() if limits.pixels is None or size[0] * size[1] <= limits.pixels]
    near = sorted(allowed, key=lambda size: (math.dist(size, home), size))
    return ", ".join(f"{width}x{height}" for width, height in near[:_NAMED_SIZES])


def _job(body: Body, options: dict[str, Any], pipe: Pipeline, limits: Limits, policy: str = "policy") -> Job:
    """The completed call; `policy` is the field that its policy comes from."""
    try:
        job = pipe.job(body.prompt, cast(Options, options))
    except FoveateError as error:
        if str(error).startswith("size must be"):
            raise ApiError(400, f"{error}; /v1/sizes lists all", param="size") from None
        raise
    width, height = job.kept["width"], job.kept["height"]
    most = limits.pixels
    _require(
        most is None or width * height <= most,
        f"size must have {most} pixels or less on this server, got {width}x{height}; /v1/sizes says which are allowed",
        "size",
    )
    # Which policy fits which scales is known only when it is bound to them.
    with about(policy):
        job.policy.bind(job.schedule, pipe.model.transformer.shape)
    return job


def _stepping(
    job: Job, body: ImageRequest, options: dict[str, Any], pipe: Pipeline, limits: Limits
) -> tuple[Job, list[WarningInfo]]:
    """The call that steps down to cheaper settings of its policy when time gets short.

    Where that cannot be, as this machine has no profile or the policy no dial, the call as it was, and a warning: it is
    still cut at its end.
    """
    try:
        timed = _job(body, {**options, "latency_budget_ms": body.latency_budget_ms}, pipe, limits)
        Ladder.of(timed, pipe.model)
    except FoveateError as error:
        message = f"the policy does not step down before latency_budget_ms is over: {error}"
        return job, [WarningInfo(code="deadline_without_levels", message=message)]
    return timed, []


def _work(body: Body, job: Job, owner: str, **deadline: Any) -> Work:
    return Work(
        job=job,
        key=owner,
        partials=body.partial_images or 0,
        every_scale=bool(body.trace),
        wants_maps=bool(body.trace),
        **deadline,
    )


def _known_warnings(job: Job, pipe: Pipeline) -> tuple[WarningInfo, ...]:
    model = pipe.model
    found = (
        *pipe.warnings,
        *warnings_of(job, model.spec, model.sha256, is_trained=model.weights == "pretrained"),
    )
    return told(found)


def told(warnings: Sequence[Any]) -> tuple[WarningInfo, ...]:
    """Warnings of a call as answers hold them."""
    return tuple(WarningInfo(code=warning.code, message=warning.message) for warning in warnings)


def _require(ok: bool, message: str, param: str, code: str = "invalid_value") -> None:
    if not ok:
        raise ApiError(400, message, param=param, code=code)
