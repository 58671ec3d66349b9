"""`foveate generate --from picture.png`: the stored picture once more, and whether its pixels are the same."""

from dataclasses import replace
from pathlib import Path

from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.drawing import report_json
from foveate.cli.generate import GenerateOptions
from foveate.cli.loading import open_pipeline
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.core.suffixes import SUFFIXES
from foveate.pipeline.encoding import Encoder
from foveate.pipeline.provenance import (
    Regenerated,
    loading_options,
    naming_damage,
    read_image_config,
    regenerate,
    registered_name,
    save_image,
    stored_threads,
)

_DEFAULT_MODEL = ModelOptions().model


def redraw(source: Path, model: ModelOptions, options: GenerateOptions) -> int:
    """Draws the picture of a file again, writes it and compares the pixels.

    Returns:
        0 if every pixel is the same, 1 otherwise.

    Raises:
        FoveateError: The file is none of ours or damaged, or its model is not here.
    """
    config, place = read_image_config(source), options.place
    suffix = source.suffix if source.suffix.lower() in SUFFIXES else ".png"
    with Staging(place.folder, [place.file] if place.file else []) as staging:
        with naming_damage(source):
            then = config["device"]
            stored = loading_options(config) | ({"device": model.device} if model.device else {})
            name = model.model if model.model != _DEFAULT_MODEL else registered_name(source, config)
            asked = replace(model, model=name, threads=stored_threads(config), **stored)
        again = regenerate(source, open_pipeline(asked, is_quiet=options.quiet))
        file = place.file or staging.free_stem(f"{source.stem}-again", [suffix]) + suffix
        own = Encoder.for_file(file)
        encoder = again.encoder if again.encoder.format == own.format else own
        save_image(again.image, staging.path(file), again.config, encoder=encoder)
        path = staging.publish()[file]
    now = again.output.config["device"]
    if now != then:
        warn(f"{source} was drawn on {then} and now on {now}: pixels may differ")
    _report(again, path, options.as_json)
    return 0 if again.is_identical else 1


def _report(again: Regenerated, path: Path, as_json: bool) -> None:
    output = again.output
    if as_json:
        image = {"path": str(path), "seed": output.seeds[again.row], "prompt": output.prompts[again.row]}
        found = {"images": [image], **report_json(output.report, output.config)}
        print_json({**found, "identical": again.is_identical, "differences": list(again.differences)})
        return
    print_facts([("pixels", "identical" if again.is_identical else "not identical")])
    print_facts([("differs", difference) for difference in again.differences])
    print_paths([path])
