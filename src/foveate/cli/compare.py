"""`foveate compare`: fidelity, time and FLOPs of one policy beside another, over the same prompts and draws."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import ModelOptions
from foveate.cli.prompts import BUILT_IN_PROMPTS
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What is compared, over what, and what is reported.

    Attributes:
        policy: The policy in question: a name, a spec such as skip-scales:count=2, or a YAML file.
        against: The policy it is measured against.
        prompts: A file with one prompt a line; without it 16 common objects are drawn.
        seeds: Pictures per prompt.
        seed: First seed of every prompt.
        runs: How often each side is timed.
        batch_size: Pictures drawn as one batch at most.
        html: Write a report with pictures to this file.
        fail_if: Exit with 1 if this holds, such as "ssim.p10 < 0.88"; may be repeated.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    policy: Annotated[str, Parameter(name=["--policy", "-p"])]
    against: str = "full"
    prompts: Path | None = None
    seeds: int = 1
    seed: int = 0
    runs: int = 3
    batch_size: int = 8
    html: Path | None = None
    fail_if: list[str] | None = None
    as_json: Annotated[bool, Parameter(name="--json")] = False
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False
    config: Path | None = None


_MODEL = ModelOptions()


def compare(*, options: CompareOptions, model: ModelOptions = _MODEL) -> int:
    """Measure how near a policy comes to another one, and how much time it saves.

    Args:
        options: What is compared, over what, and what is reported.
        model: Which model runs, and on what.
    """
    for flag in ("seeds", "runs", "batch_size"):
        if getattr(options, flag) < 1:
            raise FoveateError(f"--{flag.replace('_', '-')} must be 1 or more, got {getattr(options, flag)}")
    if options.html is not None and options.html.is_dir():
        raise FoveateError(f"--html must be a file, {options.html} is a folder")
    prompts = list(BUILT_IN_PROMPTS) if options.prompts is None else read_prompt_file(options.prompts)
    from foveate.cli import comparing  # noqa: PLC0415 - torch is loaded when the command runs

    return comparing.run(prompts, model, options)
