"""`foveate generate --from picture.png`: the stored batch once more, and whether its pixels are the same."""

from dataclasses import replace
from pathlib import Path

from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.drawing import report_json
from foveate.cli.generate import GenerateOptions
from foveate.cli.loading import open_pipeline
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.pipeline.provenance import (
    Regenerated,
    loading_options,
    naming_damage,
    read_png_config,
    regenerate,
    registered_name,
    save_png,
)

_DEFAULT_MODEL = ModelOptions().model


def redraw(source: Path, model: ModelOptions, options: GenerateOptions) -> int:
    """Draws the batch of a PNG, writes its row and compares the pixels.

    Returns:
        0 if every pixel is the same, 1 otherwise.

    Raises:
        FoveateError: The file is none of ours or damaged, or its model is not here.
    """
    config = read_png_config(source)
    path = options.output if options.is_one_file else options.output / f"{source.stem}-again.png"
    with Staging(path.parent) as staging:
        with naming_damage(source):
            then = config["device"]
            stored = loading_options(config) | ({"device": model.device} if model.device else {})
            name = model.model if model.model != _DEFAULT_MODEL else registered_name(source, config)
            asked = replace(model, model=name, **stored)
        again = regenerate(source, open_pipeline(asked, is_quiet=options.quiet))
        row = int(config.get("row", 0))
        save_png(again.image, staging.path(path.name), again.output.row_config(row))
        staging.publish()
    now = again.output.config["device"]
    if now != then:
        warn(f"{source} was drawn on {then} and now on {now}: pixels may differ")
    _report(again, row, path, options.as_json)
    return 0 if again.is_identical else 1


def _report(again: Regenerated, row: int, path: Path, as_json: bool) -> None:
    output = again.output
    if as_json:
        image = {"path": str(path), "seed": output.seeds[row], "prompt": output.prompts[row]}
        found = {"images": [image], **report_json(output)}
        print_json({**found, "identical": again.is_identical, "differences": list(again.differences)})
        return
    print_facts([("pixels", "identical" if again.is_identical else "not identical")])
    print_facts([("differs", difference) for difference in again.differences])
    print_paths([path])
