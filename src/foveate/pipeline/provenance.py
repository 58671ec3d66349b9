"""Reproducible images: what decides their bits, written into their files, read back and rerun.

Format 2 describes one image: its own prompt, seed and negative prompt, and its batch only where its bits depend on it.
Format 1 described a whole call, and which of its images this is; it is still read.
"""

import json
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from foveate.families.loading import model_names
from foveate.families.packaged import refuse_missing_demo
from foveate.pipeline.bulk import refuse_too_many
from foveate.pipeline.call import resolve
from foveate.pipeline.encoding import Encoder, read_text, text_of
from foveate.pipeline.loading import MAX_THREADS
from foveate.pipeline.options import OPTIONS, CallOptions
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import from_stored

FORMATS = (1, 2)
"""Of a configuration, those that are read."""

_NOT_COMPARED = ("row", "warnings", "asked")
"""Which image of a call it is, what was said about it, and the budget that its policy was fitted to decide no bits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Regenerated:
    """An image made again.

    Attributes:
        image: As it was generated, before it was encoded.
        is_identical: Whether it has the pixels of the file, once it is encoded as the file was.
        differences: What is different from then, one line each.
        output: Of the call that made it.
        row: Which image of the call it is.
        encoder: How the file was encoded.
        config: What belongs into a file of the image.
    """

    image: Image.Image
    is_identical: bool
    differences: tuple[str, ...]
    output: PipelineOutput[list[Image.Image]]
    row: int
    encoder: Encoder
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCall:
    """A call that makes a stored image again: its prompts, `copies` times over, and which of its images that is."""

    prompts: list[str]
    options: CallOptions
    row: int
    copies: int = 1


def save_image(
    image: Image.Image, path: str | Path, config: Mapping[str, Any], *, encoder: Encoder | None = None
) -> Path:
    """Writes an image with its configuration; the file appears complete or not at all.

    Args:
        image: RGB.
        path: Where, ending in .png, .jpg, .jpeg or .webp; an existing file is replaced, the folder must exist.
        config: `PipelineOutput.row_config(row)`; how the file is encoded is added.
        encoder: Quality and more; None takes the default of the ending (`Encoder.for_file`).

    Returns:
        The path.

    Raises:
        FoveateError: Another ending, no such folder, or a configuration too long for a JPEG.
    """
    by_suffix = Encoder.for_file(path)
    encoder = encoder or by_suffix
    if encoder.format != by_suffix.format:
        raise FoveateError(f"cannot write {encoder.format} to {path}; let the name and the format agree")
    try:
        content = encoded_image(image, config, encoder)
    except FoveateError as error:
        raise FoveateError(f"cannot write {path}: {error}") from None
    with replace_file(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def encoded_image(image: Image.Image, config: Mapping[str, Any], encoder: Encoder) -> bytes:
    """The file that `save_image` writes.

    Raises:
        FoveateError: The configuration is too long for a JPEG.
    """
    return encoder.encode(image, text_of({**config, "encoder": encoder.to_json()}))


def read_image_config(path: str | Path) -> dict[str, Any]:
    """Reads what `save_image` wrote.

    Raises:
        FoveateError: There is no such file, or it is no image of foveate.
    """
    text = read_text(path)
    if text is None:
        raise FoveateError(
            f"{path} carries no configuration of foveate; only files that it wrote, and no program since, can be made "
            "again"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise FoveateError(f"{path}: the configuration in the file is damaged") from None
    if not isinstance(config, dict):
        raise FoveateError(f"{path}: the configuration must be an object, got {type(config).__name__}")
    if config.get("format") not in FORMATS:
        known = " or ".join(map(str, FORMATS))
        raise FoveateError(f"{path}: the configuration must be of format {known}, got {config.get('format')}")
    return config


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two configurations disagree on, one line each; what decides no bits does not count."""
    flat_then, flat_now = (
        dict(_flat({name: value for name, value in config.items() if name not in _NOT_COMPARED}))
        for config in (then, now)
    )
    names = [*flat_then, *(name for name in flat_now if name not in flat_then)]
    return [
        f"{name}: {flat_then.get(name)} then, {flat_now.get(name)} now"
        for name in names
        if flat_then.get(name) != flat_now.get(name)
    ]


def regenerate(path: str | Path, pipe: Pipeline | None = None) -> Regenerated:
    """Makes the image of a file again: alone where its bits do not depend on a batch, else in a batch as large.

    That batch repeats the image's own prompt, unless the file holds all prompts of its batch. Pixels of a lossy file
    are compared behind the same encoder. Sums depend on how threads split them, and how many there are is the caller's
    to say, with `torch.set_num_threads(stored_threads(config))`.

    Args:
        path: A file that `save_image` wrote.
        pipe: The model that made it, needed if that was a folder; None loads the registered model.

    Raises:
        FoveateError: The file cannot be read, its model is not registered, its batch does not fit into memory, or its
            random state was the caller's own.
    """
    config = read_image_config(path)
    with naming_damage(path):
        encoder = Encoder.from_json(config["encoder"]) if "encoder" in config else Encoder()
        rerun = stored_call(path, config)
        stored_threads(config)
        pipe = pipe or Pipeline.from_pretrained(registered_name(path, config), **loading_options(config))
        job = resolve(rerun.prompts, {**rerun.options, "output_type": "pil"}, pipe.model.spec)
        refuse_too_many(pipe, job, job.num_images * rerun.copies)
    output = pipe(rerun.prompts * rerun.copies, **rerun.options)
    image = output.images[rerun.row]
    with Image.open(path) as before:
        is_identical = np.array_equal(np.asarray(before.convert("RGB")), np.asarray(encoder.decoded(image)))
    own = output.row_config(rerun.row, store_batch="prompts" in config.get("batch", {}))
    now = output.config if config["format"] == 1 else own
    if "encoder" in config:
        now = {**now, "encoder": encoder.to_json()}
    return Regenerated(
        image=image,
        is_identical=is_identical,
        differences=tuple(differences(config, now)),
        output=output,
        row=rerun.row,
        encoder=encoder,
        config=own,
    )


def stored_threads(config: Mapping[str, Any]) -> int:
    """How many threads of torch generated an image.

    Raises:
        FoveateError: No number that there could be.
    """
    threads = int(config["threads"])
    if not 1 <= threads <= MAX_THREADS:
        raise FoveateError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    return threads


def stored_call(path: str | Path, config: Mapping[str, Any]) -> StoredCall:
    """The call that makes a stored image again; `naming_damage` puts what Python raises on the way in words.

    Raises:
        FoveateError: It was generated from a caller's own generator, or is not an image of the batch that is described.
    """
    return _whole_call(path, config) if config["format"] == 1 else _call_of_image(path, config)


def _whole_call(path: str | Path, config: Mapping[str, Any]) -> StoredCall:
    """The whole call that format 1 describes."""
    prompts, seeds = list(config["prompts"]), list(config["seeds"])
    num, row = int(config["num_images_per_prompt"]), int(config.get("row", 0))
    if not seeds:
        raise _own_generator(path)
    if len(prompts) * num != len(seeds) or not 0 <= row < len(seeds):
        raise FoveateError(f"{path}: row, prompts and seeds must be those of a batch, got row {row} of {len(seeds)}")
    options = _options(config)
    options["negative_prompt"] = config["negative_prompts"]
    options["num_images_per_prompt"] = num
    options["seed"] = seeds[0] if config["rng"] == "reference" else seeds[::num]
    return StoredCall(prompts=prompts, options=options, row=row)


def _call_of_image(path: str | Path, config: Mapping[str, Any]) -> StoredCall:
    """The call that makes the one image of format 2 again."""
    batch = config.get("batch", {"size": 1, "index": 0})
    size, row = int(batch["size"]), int(batch["index"])
    if config["seed"] is None:
        raise _own_generator(path)
    if not 0 <= row < size:
        raise FoveateError(f"{path}: size and index must be those of a batch, got {size} and {row}")
    options = _options(config)
    options["seed"] = operator.index(config["seed"])
    if "prompts" not in batch:
        # Of the other images only the number matters.
        options["negative_prompt"] = config["negative_prompt"]
        return StoredCall(prompts=[config["prompt"]], options=options, row=row, copies=size)
    if len(batch["prompts"]) != size:
        raise FoveateError(f"{path}: a batch of {size} has as many prompts, got {len(batch['prompts'])}")
    options["negative_prompt"] = batch["negative_prompts"]
    if config["rng"] != "reference":
        options["seed"] = batch["seeds"]
    return StoredCall(prompts=list(batch["prompts"]), options=options, row=row)


def _own_generator(path: str | Path) -> FoveateError:
    return FoveateError(f"{path} was generated with a caller's generator, whose state is not in the file")


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """Turns what Python raises over a damaged configuration into one line that names the file; for reading alone."""
    try:
        yield
    except FoveateError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FoveateError(f"{path}: the configuration in the file is damaged, {error!r}") from None


def registered_name(path: str | Path, config: Mapping[str, Any]) -> str:
    """The name of the model that made an image.

    Raises:
        FoveateError: It has none, as it was loaded from a folder, or the package of that name is not installed.
    """
    name = str(config["model"])
    if name not in model_names():
        refuse_missing_demo(name)
        raise FoveateError(f"{path} was made with a local model, {name}; pass it as pipe, or as --model")
    return name


def loading_options(config: Mapping[str, Any], *, device: str | None = None) -> dict[str, Any]:
    """How the model of an image was loaded: weights, dtypes, device and kernels, as arguments of `from_pretrained`.

    Args:
        config: Of the image.
        device: Where it is made again; None takes the device that made it. On a CPU no kernels of a GPU are asked for.
    """
    device = device or config["device"]
    has_triton = config.get("kernels") == "triton" and device != "cpu"
    return {
        "weights": config["weights"]["kind"],
        "dtype": config["dtype"],
        "decoder_dtype": config.get("decoder_dtype"),
        "quantization": config.get("quantization"),
        "device": device,
        "kernels": "triton" if has_triton else None,
    }


def _options(config: Mapping[str, Any]) -> CallOptions:
    """What both formats say of every image of the call."""
    found = {}
    for name, option in OPTIONS.items():
        if option.is_kept:
            found[name] = config[name] if option.absent is None else config.get(name, option.absent)
    found["policy"] = from_stored(config["policy"]["parts"])
    # Width and height fix the size; ratio and budget are there for people.
    del found["aspect_ratio"], found["pixels"]
    return cast(CallOptions, found)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry
