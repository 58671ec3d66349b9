"""`foveate train`: makes the bundled model again from its recipe; a run that was stopped goes on where it was."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from foveate.core.errors import FoveateError

Stage = Literal["corpus", "tokenizer", "transformer", "export", "all"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What is trained, and where it is kept.

    Attributes:
        recipe: The recipe, a YAML file.
        output: Folder for the corpus, the checkpoints and the finished model.
        stage: The part to run.
        minutes_scale: Multiplies the minutes of every stage in the recipe.
        start_from: Folder of a model of the same shape that is trained further; its tokenizer is kept.
    """

    recipe: Annotated[Path, Parameter(name="--config")]
    output: Annotated[Path, Parameter(name=["--out", "--output", "-o"])]
    stage: Stage = "all"
    minutes_scale: float = 1.0
    start_from: Path | None = None


def train(*, options: TrainOptions) -> int:
    """Train the bundled model again from its recipe.

    Args:
        options: What is trained, and where it is kept.
    """
    if not options.recipe.is_file():
        raise FoveateError(f"no recipe at {options.recipe}; one comes with the sources, configs/emoji_tiny.yaml")
    if not options.minutes_scale > 0:
        raise FoveateError(f"--minutes-scale must be above 0, got {options.minutes_scale}")
    from foveate.train import recipe  # noqa: PLC0415 - torch is loaded when the command runs

    made = recipe.train(options.recipe, options.output, options.stage, _log, options.minutes_scale, options.start_from)
    sys.stdout.write(f"{made}\n")
    return 0


def _log(line: str) -> None:
    """Progress, on stderr at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
