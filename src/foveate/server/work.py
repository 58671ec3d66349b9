"""What the scheduler takes and what it says back: work, tickets and events. Nothing here knows HTTP.

A ticket is one request of n images; each image runs as a batch of its own, which has the same bits alone and in any
company. Events come from the scheduler's thread, in order per image, and must be taken quickly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.schedule import Grid
from foveate.pipeline.call import Job
from foveate.pipeline.output import PipelineOutput

OnLate = Literal["coarse", "error"]

MOST_PARTIALS = 3
"""Partial images of an image."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """One request.

    Attributes:
        job: The call, from `Pipeline.job`: one prompt, n images, keyed draws.
        key: Whose it is; keys share the machine evenly, and each key is served first in, first out.
        partials: How many partial images come before the finished one, 0 to 3 of each image.
        every_scale: Whether every scale comes with its decoded image, as a page that shows all of them wants.
        wants_maps: Whether events carry the depth of each token.
        budget_ms: When the request must be answered, counted from its acceptance; None for no deadline.
        on_late: What is answered behind that: the image of the latest finished scale, or an error.
    """

    job: Job
    key: str = "local"
    partials: int = 0
    every_scale: bool = False
    wants_maps: bool = False
    budget_ms: float | None = None
    on_late: OnLate = "coarse"

    def __post_init__(self) -> None:
        """Refuses what cannot be packed.

        Raises:
            FoveateError: Several prompts, draws in the published order, another output than PIL, a callback.
        """
        job, options = self.job, self.job.options
        if len(job.prompts) != 1:
            raise FoveateError(f"a request has one prompt, got {len(job.prompts)}; send one request per prompt")
        if options["rng"] != "keyed" or options["generator"] is not None:
            raise FoveateError('rng="reference" draws for a whole batch, so it cannot be packed; take rng="keyed"')
        if options["output_type"] != "pil" or options["callback_on_step_end"] is not None:
            raise FoveateError("images come as PIL, and events take the place of a callback; leave both out")
        if not 0 <= self.partials <= MOST_PARTIALS:
            raise FoveateError(f"partial images must be 0 to {MOST_PARTIALS}, got {self.partials}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """An image left the queue and has its memory; `waited_ms` is counted from the acceptance of its request."""

    index: int
    waited_ms: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScaleDone:
    """One scale of one image.

    Attributes:
        index: Which image of the request.
        scale: Which scale, from 0.
        num_scales: Scales of the schedule.
        grid: Its tokens, rows and columns.
        ms: Its share of the time of the batch that it ran in.
        company: Images in that batch.
        tokens_run: Tokens of the conditional branch that reached the head.
        tokens_full: Tokens of the scale.
        flops: Of this scale, both branches.
        flops_full: Of the same scale in the full run.
        image: The latent so far, decoded to full size; None unless it was asked for.
        partial: Which partial image this is, from 0; None where it is none of those that were asked for.
        depth_hw: Blocks that each token ran, where maps were asked for.
    """

    index: int
    scale: int
    num_scales: int
    grid: Grid
    ms: float
    company: int
    tokens_run: int
    tokens_full: int
    flops: float
    flops_full: float
    image: Image.Image | None = None
    partial: int | None = None
    depth_hw: UInt8[np.ndarray, "h w"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageDone:
    """A finished image: `output` is that of a call of one image; `scales` says how many of them ran before a deadline.

    Behind a deadline `is_coarse`, and the image is that of the latest finished scale.
    """

    index: int
    output: PipelineOutput[list[Image.Image]]
    scales: int
    is_coarse: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Failed:
    """The end of a request that has no more images; `error` is a `Cancelled` if it was cancelled."""

    error: Exception


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The end of a request whose images have all been sent."""

    total_ms: float


Event = Started | ScaleDone | ImageDone | Failed | Finished
"""`Failed` or `Finished` is the last one of a request, and exactly one of them comes."""

Listener = Callable[[Event], None]


class QueueFullError(FoveateError):
    """The queue takes no more; `retry_after_s` follows from the measured rate."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClosingError(FoveateError):
    """The server stops and takes no more."""


class LateError(FoveateError):
    """A request was not done when its time was up, and asked for an error then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What a scheduler holds now, and what it has measured.

    `images_per_s` is a running mean over the latest images, None before the first; `restarts` counts errors that
    escaped the loop; bytes are those of the memory model.
    """

    queued_requests: int
    queued_images: int
    running_images: int
    max_images: int
    reserved_bytes: int
    budget_bytes: int
    images_per_s: float | None
    restarts: int
    is_closing: bool


@runtime_checkable
class Ticket(Protocol):
    """An accepted request."""

    @property
    def id(self) -> str:
        """Unguessable."""

    @property
    def position(self) -> int:
        """Requests that are served before this one begins; 0 once its first image has started."""

    @property
    def flops(self) -> float:
        """Of the transformer, that were forecast for all its images."""

    def cancel(self) -> None:
        """Ends the request at the next scale; what it holds is freed. Does nothing to one that is done."""


@runtime_checkable
class Scheduling(Protocol):
    """What the HTTP layer needs of a scheduler."""

    def submit(self, work: Work, listener: Listener) -> Ticket:
        """Accepts a request; its events come to the listener.

        Raises:
            QueueFullError: Too many wait.
            ClosingError: The server stops.
            FoveateError: It would never fit into the memory; the message says by how much.
        """

    def stats(self) -> Stats:
        """What is held now; safe from any thread, never waits for a scale."""

    def close(self, grace_s: float) -> bool:
        """Takes no more, and waits until everything accepted is answered, at most `grace_s` seconds.

        What is not done by then fails with `ClosingError`. True if all was done in time.
        """
