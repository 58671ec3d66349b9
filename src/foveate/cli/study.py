"""Flags that `compare`, `sweep` and `tune` share: over what policies are measured, and what is reported."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import MEASUREMENT, OUTPUT, PICTURE, POLICY, ConfigFlag, JsonFlag, QuietFlag
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file

BUILT_IN_PROMPTS = (
    "green apple",
    "watermelon",
    "taco",
    "doughnut",
    "dolphin",
    "turtle",
    "owl",
    "zebra",
    "hibiscus",
    "evergreen tree",
    "sailboat",
    "fire engine",
    "soccer ball",
    "microphone",
    "top hat",
    "backpack",
)
"""The prompts if no file of prompts is given: single solid objects of all large groups, which the bundled model was
trained on."""

BUILT_IN_CLASSES = (
    "granny smith",
    "pineapple",
    "cheeseburger",
    "bagel",
    "killer whale",
    "loggerhead",
    "great grey owl",
    "zebra",
    "daisy",
    "lighthouse",
    "yawl",
    "fire engine",
    "soccer ball",
    "microphone",
    "bow tie",
    "backpack",
)
"""Prompts for models of ImageNet classes."""

PoliciesFlag = Annotated[list[str], Parameter(name=["--policy", "-p"], group=POLICY)]
OverFlag = Annotated[list[str], Parameter(group=POLICY)]
ControlsFlag = Annotated[bool, Parameter(group=POLICY)]


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOptions:
    """Over what policies are measured, how, and what is reported.

    Attributes:
        prompts: A file with one prompt a line, or - for stdin; default: 16 common objects, or 16 classes for VAR.
        seeds: Images per prompt.
        seed: First seed of every prompt.
        against: The policy to compare with.
        runs: How often every batch is timed with every policy.
        batch_size: Images generated as one call at most; times are compared call by call.
        judge: Another score of every image: an installed judge, or module:name of your own; may be repeated.
        store: Folder that keeps every measurement; the same command goes on there.
        html: Write a report with images to this file; an earlier one gets a number.
        csv: Write the figures of every policy to this file; an earlier one gets a number.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    seeds: int = 1
    seed: int = 0
    against: Annotated[str, Parameter(group=POLICY)] = "full"
    runs: Annotated[int, Parameter(group=MEASUREMENT)] = 3
    batch_size: Annotated[int, Parameter(group=MEASUREMENT)] = 1
    judge: Annotated[list[str] | None, Parameter(group=MEASUREMENT)] = None
    store: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    html: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    csv: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None


def checked_prompts(study: StudyOptions, files: Sequence[tuple[str, Path | None]] = ()) -> list[str] | None:
    """Checks what needs no model, and reads the prompts.

    Args:
        study: The flags.
        files: Names and values of further flags that name files to write.

    Returns:
        The prompts; None stands for the built-in ones.

    Raises:
        FoveateError: A flag is out of range, a file is a folder, or two flags name one file.
    """
    check_files(study, files)
    if study.store is not None and os.path.isfile(study.store):
        raise FoveateError(f"--store must be a folder, {study.store} is a file")
    return None if study.prompts is None else read_prompt_file(study.prompts)


def check_files(study: StudyOptions, files: Sequence[tuple[str, Path | None]] = ()) -> None:
    """Checks ranges, and the files to write.

    Raises:
        FoveateError: A flag is out of range, a file is a folder, or two flags name one file.
    """
    for flag in ("seeds", "runs", "batch_size"):
        if getattr(study, flag) < 1:
            raise FoveateError(f"--{flag.replace('_', '-')} must be 1 or more, got {getattr(study, flag)}")
    named: dict[Path, str] = {}
    for name, path in (("html", study.html), ("csv", study.csv), *files):
        if path is None:
            continue
        if os.path.isdir(path):
            raise FoveateError(f"--{name} must be a file, {path} is a folder")
        other = named.setdefault(path.absolute(), name)
        if other != name:
            raise FoveateError(f"--{other} and --{name} name the same file, {path}; give each its own")
