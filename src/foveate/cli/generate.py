"""`foveate generate`: pictures from prompts, or a stored picture once more."""

import os
import re
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
from foveate.core.suffixes import SUFFIXES

_FILE_ENDING = re.compile(r"\.(?!v\d+$)[a-z][a-z0-9]{1,4}")
"""Endings that mean a file and no folder: letters, as in .gif and .tiff; a version is none, as in out.v2 or run-1.5."""

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
        prompts: A file with one prompt a line, drawn behind those in the command.
        seed: One seed, or one per prompt with commas: 7,8; default: random.
        num_images: Pictures per prompt; picture j uses the prompt's seed + j.
        batch_size: Pictures drawn at once; default: what fits into memory, 16 at most.
        rng: reference draws in the order of the published code, from one seed for all pictures as one batch.
        source: Draw the picture of this file once more and compare the pixels; 1 is returned if any differs.
        batch_invariant: Give every image the bits that it has alone. Always so on a CPU; slower on a GPU.
        policy: Decides how much runs: a name, a spec such as skip-scales:count=2, or a YAML file.
        output: Folder for the pictures, or a .png, .jpg or .webp file for a single one.
        format: Of pictures in a folder: png, jpg or webp; default: png.
        quality: Of jpg and webp, 1 to 100; default: 95.
        lossless: Keep every pixel of a webp.
        store_batch: Also store all prompts of its batch in every picture.
        preview: Also save the coarse pictures of the earlier scales.
        trace: Also save what ran where, as JSON and drawn over each picture.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    seed: list[str] | None = None
    num_images: Annotated[int, Parameter(name=["--num-images", "-n"])] = 1
    batch_size: int | None = None
    rng: Literal["keyed", "reference"] = "keyed"
    source: Annotated[Path | None, Parameter(name="--from")] = None
    batch_invariant: bool = False
    policy: PolicyFlag = "full"
    # A text, as a path forgets the slash that says that it is a folder.
    output: Annotated[str, Parameter(name=["--output", "-o"], group=OUTPUT)] = "foveate-out"
    format: Annotated[Literal["png", "jpg", "webp"] | None, Parameter(group=OUTPUT)] = None
    quality: Annotated[int | None, Parameter(group=OUTPUT)] = None
    lossless: Annotated[bool, Parameter(group=OUTPUT)] = False
    store_batch: Annotated[bool, Parameter(group=OUTPUT)] = False
    preview: Annotated[bool, Parameter(group=OUTPUT)] = False
    trace: Annotated[bool, Parameter(group=OUTPUT)] = False
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None

    @property
    def place(self) -> "Place":
        """Where the pictures go.

        Raises:
            FoveateError: The output looks like a file that cannot be written, or disagrees with the format.
        """
        return Place.of(self.output, self.format)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where pictures go: a folder, or one file in it.

    `suffix` is the ending of every picture.
    """

    folder: Path
    file: str | None
    suffix: str

    @classmethod
    def of(cls, output: str, kind: str | None) -> "Place":
        """What `--output` and `--format` mean together.

        Raises:
            FoveateError: The name ends like a file that cannot be written, or not as the format says.
        """
        path = Path(output)
        ending = (path.suffix or path.name).lower()
        is_slashed = output.endswith(tuple(sep for sep in (os.sep, os.altsep) if sep))
        if is_slashed or ending not in SUFFIXES:
            if not is_slashed and not path.is_dir() and _FILE_ENDING.fullmatch(path.suffix.lower()):
                raise FoveateError(
                    f"cannot write {output}: pictures are {', '.join(SUFFIXES)}; for a folder of this name put a slash "
                    "behind it"
                )
            return cls(folder=path, file=None, suffix=f".{kind or 'png'}")
        if path.is_dir():
            raise FoveateError(f"cannot write {output}: it is a folder; put a slash behind it to write into it")
        if kind is not None and SUFFIXES[ending] != SUFFIXES[f".{kind}"]:
            raise FoveateError(f"--format {kind} and --output {output} disagree; leave --format out")
        if not path.suffix:
            raise FoveateError(f"cannot write {output}: there is no name in front of the ending")
        return cls(folder=path.parent, file=path.name, suffix=ending)


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
    if options.batch_size is not None and options.batch_size < 1:
        raise FoveateError(f"--batch-size must be 1 or more, got {options.batch_size}")
    count = len(prompts) * options.num_images
    if options.place.file is not None and count > 1:
        raise FoveateError(f"--output {options.output} is one picture, but {count} are asked for; give a folder")
