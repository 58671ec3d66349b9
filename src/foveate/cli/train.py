"""`foveate train`: makes the bundled model again from its recipe; a run that was stopped goes on where it was."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from foveate.core.errors import FoveateError

Stage = Literal["corpus", "tokenizer", "places", "transformer", "export", "sampling", "all"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What is trained, and where it is kept.

    Attributes:
        recipe: The recipe, a YAML file.
        output: Folder for the corpus, the checkpoints and the finished model.
        stage: The part to run.
        device: cpu or cuda; without it a GPU if there is one. The recipe may say what differs.
        minutes_scale: Multiplies the minutes of both networks.
        dry_run: Take one small step of everything in OUT/dry and write a model there that has learned nothing.
        start_from: Folder of a model of the same shape that is trained further.
        stop_after: Minutes after which to pause behind a checkpoint, with exit status 75; the same command goes on.
    """

    recipe: Annotated[Path, Parameter(name="--config")]
    output: Annotated[Path, Parameter(name=["--out", "--output", "-o"])]
    stage: Stage = "all"
    device: str | None = None
    minutes_scale: float = 1.0
    dry_run: bool = False
    start_from: Path | None = None
    stop_after: float | None = None


PAUSED = 75
"""Exit status of a run that has more to do: what sysexits.h calls a temporary failure, try again."""


def train(*, options: TrainOptions) -> int:
    """Train the bundled model again from its recipe.

    Args:
        options: What is trained, and where it is kept.
    """
    if not options.recipe.is_file():
        raise FoveateError(f"no recipe at {options.recipe}; one comes with the sources, configs/emoji_tiny.yaml")
    if not options.minutes_scale > 0:
        raise FoveateError(f"--minutes-scale must be above 0, got {options.minutes_scale}")
    if options.stop_after is not None and not options.stop_after > 0:
        raise FoveateError(f"--stop-after must be above 0, got {options.stop_after}")
    from foveate.train import loop, recipe  # noqa: PLC0415 - torch is loaded when the command runs

    try:
        made = recipe.train(
            options.recipe,
            options.output,
            options.stage,
            _log,
            recipe.Route(device=options.device, minutes_scale=options.minutes_scale, is_dry=options.dry_run),
            options.start_from,
            options.stop_after,
        )
    except loop.PauseError as pause:
        _log(str(pause))
        return PAUSED
    sys.stdout.write(f"{made}\n")
    return 0


def _log(line: str) -> None:
    """Progress, on stderr at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
