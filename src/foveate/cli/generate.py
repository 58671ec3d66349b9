"""`foveate generate`: images from prompts, or a stored image once more."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from cyclopts import Parameter

from foveate.cli.console import note, print_facts, print_json, print_paths, warn
from foveate.cli.options import (
    OUTPUT,
    PICTURE,
    ConfigFlag,
    GenerateFlags,
    JsonFlag,
    ModelOptions,
    QuietFlag,
    SizeOptions,
    ignored,
    options_of,
)
from foveate.cli.place import Place
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.core.suffixes import SUFFIXES
from foveate.pipeline.options import CallOptions, Options, checked

_NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")

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
    """Inputs beside the options of a call, and what is written.

    Attributes:
        prompts: A file with one prompt a line, added to those in the command.
        batch_size: Images generated at once; default: what fits into memory, 16 at most.
        source: Regenerate the image of this file and compare the pixels; exit code 1 if any differs.
        output: Folder for the images, or a .png, .jpg or .webp file for a single one.
        format: Of images in a folder: png, jpg or webp; default: png.
        quality: Of jpg and webp, 1 to 100; default: 95.
        lossless: Keep every pixel of a webp.
        store_batch: Also store all prompts of the batch in every image.
        preview: Also save the coarse images of the earlier scales.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    batch_size: int | None = None
    source: Annotated[Path | None, Parameter(name="--from")] = None
    # A text, as a path forgets the slash that says that it is a folder.
    output: Annotated[str, Parameter(name=["--output", "-o"], group=OUTPUT)] = "foveate-out"
    format: Annotated[Literal["png", "jpg", "webp"] | None, Parameter(group=OUTPUT)] = None
    quality: Annotated[int | None, Parameter(group=OUTPUT)] = None
    lossless: Annotated[bool, Parameter(group=OUTPUT)] = False
    store_batch: Annotated[bool, Parameter(group=OUTPUT)] = False
    preview: Annotated[bool, Parameter(group=OUTPUT)] = False
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None

    @property
    def place(self) -> Place:
        """Where the images go.

        Raises:
            FoveateError: The output looks like a file that cannot be written, or disagrees with the format.
        """
        return Place.of(self.output, self.format)


_MODEL, _SIZE, _CALL, _OPTIONS = ModelOptions(), SizeOptions(), GenerateFlags(), GenerateOptions()


def generate(
    *prompt: Annotated[str, Parameter(group=PICTURE)],
    options: GenerateOptions = _OPTIONS,
    call: GenerateFlags = _CALL,
    size: SizeOptions = _SIZE,
    model: ModelOptions = _MODEL,
) -> int:
    """Generate images from prompts.

    Args:
        prompt: What to generate: prompts, each in quotes; for VAR names or indices of classes.
        options: What is generated and written.
        call: How it is generated, and how much of the model runs.
        size: How large the images are.
        model: Which model runs, and on what.
    """
    if options.source is not None:
        _refuse_ignored(prompt, ((model, _MODEL), (size, _SIZE), (call, _CALL), (options, _OPTIONS)))
        return _redraw(options.source, model, options)
    prompts = [*prompt, *(read_prompt_file(options.prompts) if options.prompts is not None else [])]
    asked: Options = {**size.options(), **options_of(call)}
    _check(prompts, asked, options)
    return _draw(prompt, prompts, asked, model, options)


def _refuse_ignored(prompt: tuple[str, ...], records: tuple[tuple[Any, Any], ...]) -> None:
    """Refuses flags that the stored image already fixes; each record comes with its default."""
    model = records[0][0].model
    fit = {"source", *_FIT, *(_FIT_A_MODEL if model != _MODEL.model else ())}
    found = [*(["a prompt"] if prompt else []), *ignored(records, fit)]
    if found:
        raise FoveateError(
            f"--from generates a stored image again as it was, so {', '.join(found)} would be ignored; allowed are "
            f"{', '.join(_FIT.values())}, and with another --model also {', '.join(_FIT_A_MODEL.values())}"
        )


def _check(prompts: list[str], call: Options, options: GenerateOptions) -> None:
    """Checks that need no imports.

    Raises:
        FoveateError: An option of the call that no model could take, or a flag out of range.
    """
    num_images = int(checked(call)["num_images_per_prompt"])
    if not prompts:
        raise FoveateError('give at least one prompt, as in: foveate generate "a red apple"')
    if options.batch_size is not None and options.batch_size < 1:
        raise FoveateError(f"--batch-size must be 1 or more, got {options.batch_size}")
    count = len(prompts) * num_images
    if options.place.file is not None and count > 1:
        raise FoveateError(f"--output {options.output} is one image file, but {count} are asked for; give a folder")


def refuse_numbers(prompts: Sequence[str], *, draws_classes: bool) -> None:
    """Refuses a prompt that was meant as a flag's value; a class-conditional model takes numbers.

    Raises:
        FoveateError: A prompt for a model of texts is a number.
    """
    number = next((prompt for prompt in prompts if _NUMBER.fullmatch(prompt.strip())), None)
    if number is not None and not draws_classes:
        raise FoveateError(
            f"the prompt {number!r} is a number; several values of a flag have commas, as in --seed 7,8; a number as a "
            "prompt goes into a file for --prompts"
        )


def _draw(
    typed: Sequence[str], prompts: list[str], call: Options, model: ModelOptions, options: GenerateOptions
) -> int:
    """Generates in batches, and writes every image as soon as its batch is done; `typed` are prompts of the command.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written. Images that were done by then stay,
            and it says how many.
    """
    import torch  # noqa: PLC0415 - loaded when the command runs, like all that needs it

    from foveate.cli.image_files import ImageFiles, refuse_long_prompts  # noqa: PLC0415
    from foveate.cli.loading import check_call, open_pipeline, spec_of  # noqa: PLC0415
    from foveate.cli.staging import Staging  # noqa: PLC0415
    from foveate.families.residency import Residency  # noqa: PLC0415
    from foveate.pipeline.bulk import ALL_SCALES, BulkSettings, draw_rows, rows_of  # noqa: PLC0415
    from foveate.pipeline.call import draws_classes  # noqa: PLC0415
    from foveate.pipeline.encoding import Encoder  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    place, policy, spec = options.place, load_policy(call["policy"]), spec_of(model)
    refuse_numbers(typed, draws_classes=draws_classes(spec))
    encoder = Encoder.for_file(f"x{place.suffix}", options.quality, is_lossless=options.lossless)
    refuse_long_prompts(prompts, call, encoder, options.batch_size if options.store_batch else 0)
    rows = rows_of(prompts, spec, **call)
    check_call(prompts, {**call, "num_images_per_prompt": 1}, [policy], spec)
    total = len(prompts) * int(call["num_images_per_prompt"])
    how = BulkSettings(
        batch_size=options.batch_size,
        total=total,
        previews=ALL_SCALES if options.preview else 0,
        residency=Residency(offload=model.offload, release_text_encoder=model.release_text_encoder),
        hides_progress=True if options.quiet else None,
    )
    with Staging(place.folder, [place.file] if place.file else []) as staging:
        if model.device is None and not options.quiet and torch.cuda.is_available():
            note("a GPU is here; --device cuda uses it")
        pipe = open_pipeline(model, is_quiet=options.quiet)
        files = ImageFiles(
            staging=staging, place=place, encoder=encoder, stores_batch=options.store_batch, has_trace=call["trace"]
        )
        with (
            files.saying_what_is_done(total),
            closing(draw_rows(pipe, rows, how, **_of_all_rows(call))) as batches,
        ):
            for batch in batches:
                files.write(batch)
    files.report(as_json=options.as_json)
    return 0


def _of_all_rows(call: Options) -> CallOptions:
    """The options that all rows share."""
    own = ("seed", "num_images_per_prompt", "negative_prompt")
    return cast(CallOptions, {name: value for name, value in call.items() if name not in own})


def _redraw(source: Path, model: ModelOptions, options: GenerateOptions) -> int:
    """Generates the image of a file again, writes it and compares the pixels.

    Returns:
        0 if every pixel is the same, 1 otherwise.

    Raises:
        FoveateError: The file is not from foveate or damaged, or its model is not here.
    """
    from foveate.cli.image_files import report_json  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.cli.loading import check_call, open_pipeline, spec_of  # noqa: PLC0415
    from foveate.cli.staging import Staging  # noqa: PLC0415
    from foveate.pipeline import provenance  # noqa: PLC0415
    from foveate.pipeline.encoding import Encoder  # noqa: PLC0415

    config, place = provenance.read_image_config(source), options.place
    suffix = source.suffix if source.suffix.lower() in SUFFIXES else ".png"
    with Staging(place.folder, [place.file] if place.file else []) as staging:
        with provenance.naming_damage(source):
            then = config["device"]
            stored = provenance.loading_options(config, device=model.device)
            name = model.model if model.model != _MODEL.model else provenance.registered_name(source, config)
            asked = replace(model, model=name, threads=provenance.stored_threads(config), **stored)
            rerun = provenance.stored_call(source, config)
            check_call(rerun.prompts, {**rerun.options, "output_type": "pil"}, [], spec_of(asked))
        again = provenance.regenerate(source, open_pipeline(asked, is_quiet=options.quiet))
        file = place.file or staging.free_stem(f"{source.stem}-again", [suffix]) + suffix
        own = Encoder.for_file(file)
        encoder = again.encoder if again.encoder.format == own.format else own
        provenance.save_image(again.image, staging.path(file), again.config, encoder=encoder)
        path = staging.publish()[file]
    output = again.output
    now = output.config["device"]
    if now != then:
        warn(f"{source} was generated on {then} and now on {now}: pixels may differ")
    if options.as_json:
        image = {"path": str(path), "seed": output.seeds[again.row], "prompt": output.prompts[again.row]}
        found = {"images": [image], **report_json(output.report, output.config)}
        print_json({**found, "identical": again.is_identical, "differences": list(again.differences)})
    else:
        print_facts([("pixels", "identical" if again.is_identical else "not identical")])
        print_facts([("differs", difference) for difference in again.differences])
        print_paths([path])
    return 0 if again.is_identical else 1
