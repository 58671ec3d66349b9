"""`foveate generate`: pictures from prompts, or a stored picture once more."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.cli.options import ModelOptions, SamplingOptions, SizeOptions
from foveate.core.errors import FoveateError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions:
    """What is drawn, how much of the model runs, and what is written.

    Attributes:
        num_images: Pictures per prompt; picture j uses the prompt's seed + j.
        policy: Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.
        batch_invariant: Compute every picture as if it were alone, bit for bit; slower.
        output: Folder for the pictures, or a .png file for a single one.
        preview: Also save the coarse pictures of the earlier scales.
        trace: Also save what ran where, as JSON and drawn over each picture.
        source: Draw the batch stored in this PNG once more and compare the pixels; 1 is returned if any differs.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    num_images: Annotated[int, Parameter(name=["--num-images", "-n"])] = 1
    policy: Annotated[str, Parameter(name=["--policy", "-p"])] = "full"
    batch_invariant: bool = False
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("foveate-out")
    preview: bool = False
    trace: bool = False
    source: Annotated[Path | None, Parameter(name="--from")] = None
    as_json: Annotated[bool, Parameter(name="--json")] = False
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"])] = False
    config: Path | None = None

    @property
    def is_one_file(self) -> bool:
        """Whether `output` names a picture and not a folder."""
        return self.output.suffix.lower() == ".png"


_MODEL, _SIZE, _SAMPLING, _OPTIONS = ModelOptions(), SizeOptions(), SamplingOptions(), GenerateOptions()


def generate(
    prompts: list[str] | None = None,
    *,
    model: ModelOptions = _MODEL,
    size: SizeOptions = _SIZE,
    sampling: SamplingOptions = _SAMPLING,
    options: GenerateOptions = _OPTIONS,
) -> int:
    """Draw pictures from prompts.

    Args:
        prompts: What to draw; each prompt in quotes.
        model: Which model runs, and on what.
        size: How large the pictures are.
        sampling: How symbols are drawn.
        options: What is drawn and written.
    """
    if options.source is not None:
        ignored = _ignored(prompts, model, size, sampling, options)
        if ignored:
            raise FoveateError(
                f"--from draws a stored picture as it was, so {', '.join(ignored)} would be ignored; "
                "besides it only --model, --output and --json fit"
            )
        from foveate.cli import redrawing  # noqa: PLC0415 - torch is loaded when the command runs

        return redrawing.redraw(options.source, model, options)
    _check(prompts or [], options)
    from foveate.cli import drawing  # noqa: PLC0415

    return drawing.draw(prompts or [], model, size, sampling, options)


def _ignored(
    prompts: list[str] | None,
    model: ModelOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    options: GenerateOptions,
) -> list[str]:
    """What was asked for although the stored picture already fixes it."""
    fit = {"source", "output", "as_json", "quiet", "config", "model"}
    if model.model != _MODEL.model:
        fit |= {"revision", "local_files_only", "autoencoder", "text_encoder", "offload", "release_text_encoder"}
    found = ["a prompt"] if prompts else []
    records: tuple[tuple[Any, Any], ...] = (
        (model, _MODEL), (size, _SIZE), (sampling, _SAMPLING), (options, _OPTIONS),
    )  # fmt: skip
    for given, default in records:
        names = [field.name for field in fields(given) if field.name not in fit]
        found += [f"--{n.replace('_', '-')}" for n in names if getattr(given, n) != getattr(default, n)]
    return found


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
