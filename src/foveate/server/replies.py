"""From events to bodies and messages of the API; encoding takes long and runs in worker threads.

Files hold the metadata that `foveate generate` writes.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveate.eval.fidelity import psnr, ssim
from foveate.pipeline.encoding import Encoder
from foveate.pipeline.pipeline import stack_uint8
from foveate.pipeline.provenance import encoded_image
from foveate.server.admission import Asked, told
from foveate.server.reproduce import Origin, command_of, curl_of
from foveate.server.schemas import (
    AcceptedEvent,
    CompletedEvent,
    DepthMap,
    Fidelity,
    ImageInfo,
    InputDetails,
    Milliseconds,
    PartialImageEvent,
    PolicyInfo,
    Run,
    ScaleEvent,
    ScaleInfo,
    Usage,
    WarningInfo,
)
from foveate.server.work import ImageDone, ScaleDone

_SCALE_JPEG = Encoder(format="jpeg", quality=85)
"""Images of a page that shows every scale."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Made:
    """A finished image and what is said of it."""

    event: ImageDone
    info: ImageInfo
    usage: Usage

    @classmethod
    def of(
        cls, asked: Asked, event: ImageDone, waited_ms: float, scales: Sequence[ScaleInfo], origin: Origin
    ) -> "Made":
        """Says it of an image.

        Args:
            asked: What was asked.
            event: Its last one.
            waited_ms: In the queue.
            scales: That ran.
            origin: Where requests go.
        """
        output = event.output
        report, config, seed = output.report, output.config, output.seeds[0]
        policy = PolicyInfo(spec=config["policy"]["spec"], fingerprint=config["policy"]["fingerprint"])
        ms = report.ms
        own = {warning.code for warning in report.warnings}
        before = [warning for warning in asked.warnings if warning.code not in own]
        info = ImageInfo(
            seed=seed,
            policy=policy,
            ms=Milliseconds(
                text=ms.text, transformer=ms.transformer, decoder=ms.decoder, total=ms.total, queue=waited_ms
            ),
            flops=Run(run=report.flops_run, full=report.flops_full),
            tokens=Run(run=report.tokens_run, full=report.tokens_full),
            scales=list(scales),
            warnings=[*before, *told(report.warnings)],
            is_coarse=event.is_coarse,
            command=command_of(asked, seed, policy.spec, origin),
            curl=curl_of(asked, seed, policy.spec, origin),
        )
        text_tokens = output.trace.text_tokens.get((0, True), 0)
        tokens = sum(h * w for h, w in asked.job.schedule.grids[: event.scales])
        return cls(event=event, info=info, usage=_usage(text_tokens, tokens))


def file_of(asked: Asked, event: ImageDone) -> bytes:
    """The file of a finished image, which the operator's check has let pass."""
    return encoded_image(event.output.images[0], event.output.row_config(0), asked.encoder)


def completed(asked: Asked, made: Made) -> CompletedEvent:
    """The event of a finished image, which the operator's check has let pass."""
    return CompletedEvent(
        side=asked.side,
        b64_json=as_base64(file_of(asked, made.event)),
        created_at=int(time.time()),
        output_format=asked.encoder.format,  # type: ignore[arg-type]  # it came from that field
        quality=asked.quality or "auto",
        size=asked.size,
        image_index=made.event.index,
        usage=made.usage,
        foveate=made.info,
    )


def of_scale(asked: Asked, event: ScaleDone) -> list[PartialImageEvent | ScaleEvent]:
    """What a stream says of a scale: nothing, unless it is a partial image or everything was asked for.

    The operator's check has let its image pass.
    """
    found: list[PartialImageEvent | ScaleEvent] = []
    if asked.body.trace:
        found.append(_scale(asked, event))
    if event.partial is not None and event.image is not None:
        partial = PartialImageEvent(
            side=asked.side,
            b64_json=as_base64(asked.encoder.encode(event.image)),
            created_at=int(time.time()),
            output_format=asked.encoder.format,  # type: ignore[arg-type]  # it came from that field
            quality=asked.quality or "auto",
            size=asked.size,
            image_index=event.index,
            partial_image_index=event.partial,
        )
        found.append(partial)
    return found


def accepted(asked: Asked, request_id: str, position: int) -> AcceptedEvent:
    """The first event of a stream with trace."""
    job = asked.job
    return AcceptedEvent(
        side=asked.side,
        id=request_id,
        seeds=list(job.seeds),
        size=asked.size,
        model=asked.model,
        policy=PolicyInfo(spec=job.policy.spec, fingerprint=job.policy.fingerprint),
        position=position,
        num_scales=len(job.schedule),
        warnings=list(asked.warnings),
    )


def fidelity_of(a: Made, b: Made) -> Fidelity:
    """Side a measured against side b."""
    first, second = (stack_uint8(made.event.output.images) for made in (a, b))
    return Fidelity(
        psnr=float(psnr(first, second)[0]),
        ssim=float(ssim(first, second)[0]),
        identical=bool(np.array_equal(first, second)),
        flops_ratio=a.info.flops.run / b.info.flops.run,
    )


def total_usage(made: Sequence[Made]) -> Usage:
    """Of all images of a request, whose prompt was read once."""
    first = made[0].usage
    return _usage(first.input_tokens, sum(one.usage.output_tokens for one in made))


def all_warnings(made: Sequence[Made]) -> list[WarningInfo]:
    """Those of all images, each once."""
    return list({(w.code, w.message): w for one in made for w in one.info.warnings}.values())


def as_base64(content: bytes) -> str:
    """As JSON carries bytes."""
    return base64.b64encode(content).decode("ascii")


def _scale(asked: Asked, event: ScaleDone) -> ScaleEvent:
    depth = None
    if event.depth_hw is not None:
        num_blocks = asked.num_blocks
        depth = DepthMap(b64=as_base64(np.ascontiguousarray(event.depth_hw).tobytes()), num_blocks=num_blocks)
    return ScaleEvent(
        side=asked.side,
        image_index=event.index,
        scale=event.scale,
        num_scales=event.num_scales,
        grid=event.grid,
        ms=event.ms,
        company=event.company,
        tokens=Run(run=event.tokens_run, full=event.tokens_full),
        flops=Run(run=int(event.flops), full=int(event.flops_full)),
        b64_json=None if event.image is None else _jpeg(event.image),
        depth=depth,
    )


def _jpeg(image: Image.Image) -> str:
    return as_base64(_SCALE_JPEG.encode(image))


def _usage(text_tokens: int, image_tokens: int) -> Usage:
    return Usage(
        input_tokens=text_tokens,
        input_tokens_details=InputDetails(text_tokens=text_tokens),
        output_tokens=image_tokens,
        total_tokens=text_tokens + image_tokens,
    )
