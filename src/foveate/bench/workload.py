"""What is generated in a measurement: images of one size in batches of one size, from prompts that take turns."""

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.core.conditions import ClassLabel
from foveate.core.policy import Policy
from foveate.pipeline.call import Job, resolve
from foveate.pipeline.options import Options
from foveate.pipeline.pipeline import Pipeline

DEFAULT_PROMPT, DEFAULT_CLASS = "a red apple on a wooden table in the morning light", "0"
"""One prompt or one class, so that the time of the text encoder does not vary from run to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One size and batch; no size stands for the model's own.

    Round r generates the next `batch` prompts and seeds, the same ones under every policy.
    """

    batch: int
    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    seed: int = 0
    size: tuple[int, int] | None = None
    aspect_ratio: str | None = None
    pixels: str | None = None

    def texts(self, round_index: int) -> list[str]:
        """The prompts of a round, one per image."""
        first = round_index * self.batch
        return [self.prompts[(first + i) % len(self.prompts)] for i in range(self.batch)]

    def options(self, round_index: int, policy: Policy) -> Options:
        """The options of a round's call; images come back as bytes in main memory."""
        first = self.seed + round_index * self.batch
        width, height = self.size if self.size is not None else (None, None)
        return Options(
            policy=policy,
            seed=[first + i for i in range(self.batch)],
            width=width,
            height=height,
            aspect_ratio=self.aspect_ratio,
            pixels=self.pixels,
            output_type="np",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The images of a workload, defaults filled in; `tokens` of all scales of one image in one branch."""

    width: int
    height: int
    aspect_ratio: str
    pixels: str
    tokens: int
    num_scales: int

    @classmethod
    def of(cls, job: Job, stride: int) -> "Picture":
        """The images of a call; `stride` is the pixels along a side of a token."""
        height, width = job.schedule.grids[-1]
        return cls(
            width=width * stride,
            height=height * stride,
            aspect_ratio=job.ratio,
            pixels=job.budget,
            tokens=job.schedule.num_tokens,
            num_scales=len(job.schedule),
        )


def default_prompt(pipe: Pipeline) -> str:
    """What a model generates where nothing else is asked for: a class if classes are all it knows."""
    (condition,) = pipe.model.text.encode([DEFAULT_CLASS])
    return DEFAULT_CLASS if isinstance(condition, ClassLabel) else DEFAULT_PROMPT


def check_workload(pipe: Pipeline, workload: Workload, policies: Sequence[Policy], num_rounds: int) -> Picture:
    """Finds what the pipeline or a policy would refuse in any round, before anything is measured.

    Raises:
        FoveateError: A size, seed or class that does not exist, or a policy that does not fit the schedule.
    """
    pipe.model.text.encode(list(dict.fromkeys(text for index in range(num_rounds) for text in workload.texts(index))))
    # Seeds only grow, so the last round has the largest ones.
    last = num_rounds - 1
    job = resolve(workload.texts(last), workload.options(last, policies[0]), pipe.model.spec)
    for policy in policies:
        policy.bind(job.schedule, pipe.model.transformer.shape)
    return Picture.of(job, pipe.model.spec.stride)
