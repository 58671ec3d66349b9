"""`foveate compare`: fidelity, time and FLOPs of one policy beside another, over the same prompts and draws."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PICTURE,
    POLICY,
    ConfigFlag,
    JsonFlag,
    ModelOptions,
    PolicyFlag,
    QuietFlag,
    SamplingOptions,
    SizeOptions,
)
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What is compared, over what, and what is reported.

    Attributes:
        prompts: A file with one prompt a line, or - for stdin; without it 16 common objects are drawn, or 16 classes
            for VAR.
        seeds: Pictures per prompt.
        seed: First seed of every prompt.
        policy: The policy in question: a name, a spec such as skip-scales:count=2, or a YAML file.
        against: The policy it is measured against.
        runs: How often each side is timed.
        batch_size: Pictures drawn as one batch at most.
        html: Write a report with pictures to this file; an earlier one gets a number.
        fail_if: Exit with 1 if this holds, such as "ssim.p10 < 0.88"; may be repeated. The figures are listed below.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    seeds: int = 1
    seed: int = 0
    policy: PolicyFlag
    against: Annotated[str, Parameter(group=POLICY)] = "full"
    runs: Annotated[int, Parameter(group=MEASUREMENT)] = 3
    batch_size: Annotated[int, Parameter(group=MEASUREMENT)] = 8
    html: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    fail_if: Annotated[list[str] | None, Parameter(group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None


_MODEL, _SIZE, _SAMPLING = ModelOptions(), SizeOptions(), SamplingOptions()


def compare(
    *,
    options: CompareOptions,
    size: SizeOptions = _SIZE,
    sampling: SamplingOptions = _SAMPLING,
    model: ModelOptions = _MODEL,
) -> int:
    """Measure how near a policy comes to another one, and how much time it saves.

    Args:
        options: What is compared, over what, and what is reported.
        size: How large the pictures are.
        sampling: How symbols are drawn.
        model: Which model runs, and on what.
    """
    for flag in ("seeds", "runs", "batch_size"):
        if getattr(options, flag) < 1:
            raise FoveateError(f"--{flag.replace('_', '-')} must be 1 or more, got {getattr(options, flag)}")
    if options.html is not None and os.path.isdir(options.html):
        raise FoveateError(f"--html must be a file, {options.html} is a folder")
    prompts = None if options.prompts is None else read_prompt_file(options.prompts)
    from foveate.cli import comparing  # noqa: PLC0415 - torch is loaded when the command runs

    return comparing.run(prompts, model, size, sampling, options)
