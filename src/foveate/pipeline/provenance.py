"""Pictures that can be made again: the whole batch's configuration in a PNG text chunk, read back and rerun."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.families.loading import model_names
from foveate.pipeline.call import Options, resolve, settings_of
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import all_policies, join

CHUNK = "foveate"
"""Name of the text chunk."""

_MAX_THREADS = 4096


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Regenerated:
    """A picture made again: whether its bytes are those of the file, and what is different from then."""

    image: Image.Image
    is_identical: bool
    differences: tuple[str, ...]
    output: PipelineOutput


def save_png(image: Image.Image, path: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes a picture with its configuration; the file appears complete or not at all.

    Args:
        image: RGB.
        path: Where; an existing file is replaced, the folder must exist.
        config: `PipelineOutput.row_config(row)`.

    Returns:
        The path.
    """
    text = PngImagePlugin.PngInfo()
    text.add_text(CHUNK, json.dumps(config, separators=(",", ":")))
    with replace_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)
    return Path(path)


def read_png_config(path: str | Path) -> dict[str, Any]:
    """Reads what `save_png` wrote.

    Raises:
        FoveateError: There is no such file, or it is no PNG of foveate.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FoveateError(f"cannot read {path} as a picture: {error}") from None
    if not isinstance(text, str):
        raise FoveateError(f"{path} carries no configuration of foveate; only its own PNG files can be made again")
    try:
        config = json.loads(text)
    except ValueError:
        raise FoveateError(f"{path}: the configuration in the file is damaged") from None
    if not isinstance(config, dict):
        raise FoveateError(f"{path}: the configuration must be an object, got {type(config).__name__}")
    if config.get("format") != 1:
        raise FoveateError(f"{path}: the configuration must be of format 1, got {config.get('format')}")
    return config


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two configurations disagree on, one line each; which row of the batch it is does not count."""
    flat_then, flat_now = dict(_flat(then)), dict(_flat(now))
    names = [name for name in [*flat_then, *(n for n in flat_now if n not in flat_then)] if name != "row"]
    return [
        f"{name}: {flat_then.get(name)} then, {flat_now.get(name)} now"
        for name in names
        if flat_then.get(name) != flat_now.get(name)
    ]


def regenerate(path: str | Path, pipe: Pipeline | None = None) -> Regenerated:
    """Makes the picture of a PNG again by running its whole batch as it was run.

    The number of threads is set to what it was and set back afterwards.

    Args:
        path: A PNG that `save_png` wrote.
        pipe: The model that made it, needed if that was a folder; None loads the registered model.

    Raises:
        FoveateError: The file cannot be read, its model is not registered, or its random state was the caller's own.
    """
    config = read_png_config(path)
    with naming_damage(path):
        if not config["seeds"]:
            raise FoveateError(f"{path} was drawn from a caller's generator, whose state is not in the file")
        pipe = pipe or Pipeline.from_pretrained(registered_name(path, config), **loading_options(config))
        options = _options(config)
        resolve(config["prompts"], settings_of(options), pipe.model.spec)
        row, threads = int(config.get("row", 0)), int(config["threads"])
        prompts = list(config["prompts"])
        if not 0 <= row < len(config["seeds"]) or not 1 <= threads <= _MAX_THREADS:
            raise FoveateError(f"{path}: row and threads must be those of a batch, got {row} and {threads}")
    with _threads(threads):
        output = pipe.generate(prompts, **options)
    assert isinstance(output.images, list), "the rerun asks for PIL images"
    image = output.images[row]
    with Image.open(path) as before:
        is_identical = bool(np.array_equal(np.asarray(before.convert("RGB")), np.asarray(image)))
    return Regenerated(
        image=image,
        is_identical=is_identical,
        differences=tuple(differences(config, output.config)),
        output=output,
    )


def policy_from_parts(parts: Sequence[Mapping[str, Any]]) -> Policy:
    """A policy from `config["policy"]["parts"]`: every field as it was, whatever the defaults are now.

    Raises:
        FoveateError: A policy or field that this installation does not know.
    """
    known = all_policies()
    policies = []
    for part in parts:
        fields = {name: value for name, value in part.items() if name != "policy"}
        if part["policy"] not in known:
            raise FoveateError(f"no policy {part['policy']!r} in this installation; there are {', '.join(known)}")
        try:
            policies.append(known[part["policy"]](**fields))
        except TypeError as error:
            raise FoveateError(f"policy {part['policy']} has other fields in this version: {error}") from None
    return join(policies)


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
    """The name of the model that made a PNG.

    Raises:
        FoveateError: It has none, as it was loaded from a folder.
    """
    if config["model"] not in model_names():
        raise FoveateError(f"{path} was made with a local model, {config['model']}; load it and pass it as pipe")
    return str(config["model"])


def loading_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the model of a PNG was loaded: weights, number formats and device, in the words of `from_pretrained`."""
    return {
        "weights": config["weights"]["kind"],
        "dtype": config["dtype"],
        "decoder_dtype": config.get("decoder_dtype"),
        "quantization": config.get("quantization"),
        "device": config["device"],
    }


def _options(config: Mapping[str, Any]) -> Options:
    num, seeds = int(config["num_images_per_prompt"]), list(config["seeds"])
    return Options(
        negative_prompt=config["negative_prompts"],
        width=config["width"],
        height=config["height"],
        guidance_scale=config["guidance_scale"],
        temperature=config["temperature"],
        top_k=config["top_k"],
        top_p=config["top_p"],
        more_smooth=config.get("more_smooth", False),
        num_images_per_prompt=num,
        seed=seeds[0] if config["rng"] == "reference" else seeds[::num],
        rng=config["rng"],
        policy=policy_from_parts(config["policy"]["parts"]),
        batch_invariant=config["batch_invariant"],
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Computes with this many threads inside, as sums depend on how they are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry
