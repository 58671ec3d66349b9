"""`foveate generate`: pictures from prompts, or a stored picture once more."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from foveate.cli.options import (
    OUTPUT,
    PICTURE,
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

_FIT = {
    "model": "--model", "device": "--device", "output": "--output", "as_json": "--json", "quiet": "--quiet",
    "config": "--config",
}  # fmt: skip
"""What may stand beside `--from`."""
_FIT_A_MODEL = {
    "autoencoder": "--autoencoder", "text_encoder": "--text-encoder", "revision": "--revision",
    "local_files_only": "--local-files-only", "offload": "--offload", "release_text_encoder": "--release-text-encoder",
}  # fmt: skip
"""What may also, where a model is named."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """What is drawn, how much of the model runs, and what is written.

    Attributes:
        prompts: A file with one prompt a line, drawn behind those in the command; all of them are one batch.
        seed: One seed, or one per prompt with commas: 7,8; default: random.
        num_images: Pictures per prompt; picture j uses the prompt's seed + j.
        rng: reference draws in the order of the published code, from one seed for the whole batch.
        source: Draw the batch stored in this PNG once more and compare the pixels; 1 is returned if any differs.
        batch_invariant: Give every image the bits that it has alone. Always so on a CPU; slower on a GPU.
        policy: Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.
        output: Folder for the pictures, or a .png file for a single one.
        preview: Also save the coarse pictures of the earlier scales.
        trace: Also save what ran where, as JSON and drawn over each picture.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    seed: list[str] | None = None
    num_images: Annotated[int, Parameter(name=["--num-images", "-n"])] = 1
    rng: Literal["keyed", "reference"] = "keyed"
    source: Annotated[Path | None, Parameter(name="--from")] = None
    batch_invariant: bool = False
    policy: PolicyFlag = "full"
    output: Annotated[Path, Parameter(name=["--output", "-o"], group=OUTPUT)] = Path("foveate-out")
    preview: Annotated[bool, Parameter(group=OUTPUT)] = False
    trace: Annotated[bool, Parameter(group=OUTPUT)] = False
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None

    @property
    def is_one_file(self) -> bool:
        """Whether `output` names a picture and not a folder."""
        return self.output.suffix.lower() == ".png"


_MODEL, _SIZE, _SAMPLING, _OPTIONS = ModelOptions(), SizeOptions(), SamplingOptions(), GenerateOptions()


def generate(
    *prompt: Annotated[str, Parameter(group=PICTURE)],
    options: GenerateOptions = _OPTIONS,
    size: SizeOptions = _SIZE,
    sampling: SamplingOptions = _SAMPLING,
    model: ModelOptions = _MODEL,
) -> int:
    """Draw pictures from prompts.

    Args:
        prompt: What to draw: prompts, each in quotes; for VAR names or indices of classes.
        options: What is drawn and written.
        size: How large the pictures are.
        sampling: How symbols are drawn.
        model: Which model runs, and on what.
    """
    if options.source is not None:
        _refuse_ignored(prompt, model, size, sampling, options)
        from foveate.cli import redrawing  # noqa: PLC0415 - torch is loaded when the command runs

        return redrawing.redraw(options.source, model, options)
    prompts = [*prompt, *(read_prompt_file(options.prompts) if options.prompts is not None else [])]
    _check(prompts, options)
    from foveate.cli import drawing  # noqa: PLC0415

    drawing.refuse_numbers(prompt, model)
    return drawing.draw(prompts, model, size, sampling, options)


def _refuse_ignored(
    prompt: tuple[str, ...],
    model: ModelOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    options: GenerateOptions,
) -> None:
    """Says what was asked for although the stored picture already fixes it."""
    fit = {"source", *_FIT, *(_FIT_A_MODEL if model.model != _MODEL.model else ())}
    ignored = ["a prompt"] if prompt else []
    records: tuple[tuple[Any, Any], ...] = (
        (model, _MODEL), (size, _SIZE), (sampling, _SAMPLING), (options, _OPTIONS),
    )  # fmt: skip
    for given, default in records:
        names = [field.name for field in fields(given) if field.name not in fit]
        ignored += [f"--{n.replace('_', '-')}" for n in names if getattr(given, n) != getattr(default, n)]
    if ignored:
        raise FoveateError(
            f"--from draws a stored picture as it was, so {', '.join(ignored)} would be ignored; besides it fit "
            f"{', '.join(_FIT.values())}, and with another --model also {', '.join(_FIT_A_MODEL.values())}"
        )


def _check(prompts: list[str], options: GenerateOptions) -> None:
    """What can be said before anything is loaded."""
    if not prompts:
        raise FoveateError('give at least one prompt, as in: foveate generate "a red apple"')
    if any(not prompt.strip() for prompt in prompts):
        raise FoveateError("a prompt must not be empty; say what to draw")
    if options.num_images < 1:
        raise FoveateError(f"-n must be 1 or more, got {options.num_images}")
    if options.is_one_file and len(prompts) * options.num_images > 1:
        count = len(prompts) * options.num_images
        raise FoveateError(f"--output {options.output} is one picture, but {count} are asked for; give a folder")
