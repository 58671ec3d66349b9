"""One real request and the events that a scheduler sends of it, for tests of what watches them."""

from typing import Any

from foveate.pipeline.pipeline import Pipeline
from foveate.server.work import Event, Finished, ImageDone, ScaleDone, Started, Stats, Work

PROMPT = "a red cat"

IDLE = Stats(
    queued_requests=2,
    queued_images=3,
    running_images=4,
    max_images=8,
    reserved_bytes=1_000,
    budget_bytes=9_000,
    images_per_s=2.5,
    restarts=1,
    is_closing=False,
)


def request(pipe: Pipeline, partials: int = 1, **options: Any) -> Work:
    """Work of one image of the toy, with a key that nothing may repeat."""
    return Work(job=pipe.job(PROMPT, {"seed": 7, **options}), key="sk-secret", partials=partials, budget_ms=900.0)


def events_of(pipe: Pipeline, work: Work, *, partial: int | None = 2, is_coarse: bool = False) -> list[Event]:
    """The events of that image: it waited 250 ms, and the scale `partial` comes with an image."""
    found: list[Event] = [Started(index=0, waited_ms=250.0)]
    streamed = list(pipe.stream(PROMPT, previews=20, seed=7, policy=work.job.policy))
    output = streamed[-1].output
    assert output is not None
    for event in streamed:
        is_partial = event.scale == partial
        done = ScaleDone(
            index=0,
            scale=event.scale,
            num_scales=len(streamed),
            grid=event.grid,
            ms=10.0 * (event.scale + 1),
            company=2,
            tokens_run=event.tokens_run,
            tokens_full=event.tokens_full,
            flops=60.0,
            flops_full=100.0,
            image=event.images[0] if is_partial else None,
            partial=0 if is_partial else None,
        )
        found.append(done)
    image = ImageDone(index=0, output=output, scales=len(streamed), is_coarse=is_coarse)
    return [*found, image, Finished(total_ms=700.0)]
