"""From rows to the images that they ask for, and to groups that can share a batch."""

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from foveate.bulk.rows import Row
from foveate.bulk.settings import NOT_OF_A_RUN
from foveate.core.errors import FoveateError
from foveate.pipeline.bulk import ImageRow
from foveate.pipeline.call import Job
from foveate.pipeline.options import CallOptions, Options
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_spec

_SEED_BITS = 47
"""Of a seed that is derived from an id: far below the largest seed, and exact as a number in JSON and JavaScript."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One image of a row.

    Attributes:
        row: Which asks for it.
        image: Which of the row's images it is, from 0.
        seed: Of this image.
        options: Of the call, without what rows have each for themselves.
        group: Tasks of one group can share a batch.
    """

    row: Row
    image: int
    seed: int
    options: CallOptions
    group: Hashable

    @property
    def key(self) -> tuple[int, int]:
        """Row and image."""
        return (self.row.index, self.image)

    @property
    def is_reference(self) -> bool:
        """Whether its draws belong to a call of all images of its row."""
        return self.options.get("rng") == "reference"

    @property
    def negative_prompt(self) -> str | None:
        """What the row wants to avoid, or the run."""
        return cast("str | None", self.row.options.get("negative_prompt"))

    @property
    def image_row(self) -> ImageRow:
        """As the pipeline takes it."""
        return ImageRow(prompt=self.row.prompt, seed=self.seed, negative_prompt=self.negative_prompt)


def seed_of(base: int, row_id: str) -> int:
    """The seed of a row that has none: the same for its id wherever the row stands."""
    digest = hashlib.sha256(f"{base}:{row_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def with_run(row: Row, options: Options) -> Row:
    """A row with the options of the run where it says nothing else; a size of its own replaces that of the run.

    Raises:
        FoveateError: The row's policy is a file, whose content could change between two runs.
    """
    own = dict(row.options)
    run: dict[str, Any] = {name: value for name, value in options.items() if value is not None and name != "seed"}
    sizes = ("width", "height", "aspect_ratio", "pixels")
    if any(own.get(name) is not None for name in sizes):
        run = {name: value for name, value in run.items() if name not in sizes}
    if (policy := own.get("policy")) is not None:
        own["policy"] = load_spec(str(policy))
    return Row(index=row.index, id=row.id, prompt=row.prompt, options=cast(Options, {**run, **own}), extra=row.extra)


def job_of(pipe: Pipeline, row: Row, base_seed: int) -> Job:
    """The call of a row alone, checked.

    Raises:
        FoveateError: The model refuses it.
    """
    seed = row.options.get("seed")
    own: Options = {**row.options, "seed": seed_of(base_seed, row.id) if seed is None else seed}
    if own.get("latency_budget_ms") is not None:
        raise FoveateError("latency_budget_ms lets a clock decide the image; leave it out of a run, or take a budget")
    return pipe.job(row.prompt, own)


def kind_of(row: Row) -> Hashable:
    """What images of a row have in common with those of others that cost the same and can share batches."""
    is_reference = row.options.get("rng") == "reference"
    has_negative = row.options.get("negative_prompt") is not None
    # Draws in the published order belong to one call: such a row shares its batch with no other one.
    return (_hashable(_shared(row)), has_negative, row.index if is_reference else None)


def _shared(row: Row) -> CallOptions:
    return cast(CallOptions, {name: value for name, value in row.options.items() if name not in NOT_OF_A_RUN})


def tasks_of(row: Row, job: Job) -> Iterator[Task]:
    """The images of a row."""
    options, group = _shared(row), kind_of(row)
    for image in range(job.images_per_prompt):
        yield Task(row=row, image=image, seed=job.seeds[image], options=options, group=group)


def groups_of(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that can share batches, in their order."""
    found: dict[Hashable, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.group, []).append(task)
    return list(found.values())


def _hashable(value: object) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((name, _hashable(entry)) for name, entry in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_hashable(entry) for entry in value)
    return value
