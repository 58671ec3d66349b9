"""Flags to a loaded pipeline."""

import difflib
from pathlib import Path

import torch

from foveate.cli.options import ModelOptions
from foveate.core.errors import FoveateError
from foveate.families import model_names
from foveate.pipeline import Pipeline


def check_model_name(name: str) -> None:
    """Refuses what is neither a registered name nor a folder.

    Raises:
        FoveateError: The closest name is suggested.
    """
    names = model_names()
    if name in names or Path(name).is_dir():
        return
    close = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise FoveateError(f"no model {name!r}; {hint}there are {', '.join(names)}, or a folder with config.json")


def open_pipeline(options: ModelOptions, *, is_quiet: bool) -> Pipeline:
    """Loads the model that the flags ask for; sets the number of threads of this process.

    Raises:
        FoveateError: There is no such model, or a flag is out of range.
    """
    check_model_name(options.model)
    if options.threads is not None:
        if options.threads < 1:
            raise FoveateError(f"--threads must be 1 or more, got {options.threads}")
        torch.set_num_threads(options.threads)
    pipe = Pipeline.from_pretrained(
        options.model,
        weights=options.weights,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        local_files_only=options.local_files_only,
    )
    if is_quiet:
        pipe.set_progress_bar_config(disable=True)
    return pipe
