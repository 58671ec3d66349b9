"""`foveate generate --from picture.png`: the stored batch once more, and whether its pixels are the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.drawing import report_json
from foveate.cli.generate import GenerateOptions
from foveate.cli.loading import open_pipeline
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.pipeline import Pipeline
from foveate.png import Regenerated, naming_damage, read_png_config, regenerate, save_png

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
            pipe = _pipeline(config, model, options)
        again = regenerate(source, pipe, device=model.device)
        row = int(config.get("row", 0))
        save_png(again.image, staging.path(path.name), again.output.row_config(row))
        staging.publish()
    now = again.output.config["device"]
    if now != then:
        warn(f"{source} was drawn on {then} and now on {now}: pixels may differ")
    _report(again, row, path, options.as_json)
    return 0 if again.is_identical else 1


def _pipeline(config: dict[str, Any], model: ModelOptions, options: GenerateOptions) -> Pipeline | None:
    """A model named by hand, in the number formats of the file; None takes the file's own."""
    if model.model == _DEFAULT_MODEL:
        return None
    stored = replace(
        model,
        weights=config["weights"]["kind"],
        dtype=config["dtype"],
        decoder_dtype=config.get("decoder_dtype"),
        quantization=config.get("quantization"),
        fp8_scales=config.get("fp8_scales", 0),
        device=model.device or config["device"],
    )
    return open_pipeline(stored, is_quiet=options.quiet)


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
