"""`python -m recipes.emoji`: trains the bundled models from their recipes, and measures how good they are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from foveate.core.errors import FoveateError

Stage = Literal["corpus", "tokenizer", "places", "transformer", "export", "sampling", "model", "all"]

BAD_USAGE, INTERRUPTED = 2, 130

PAUSED = 75
"""Exit status of a run that has more to do: what sysexits.h calls a temporary failure, try again."""

_OUTPUT = Parameter(name=["--output", "-o"])


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Where a run is kept, and how much of it happens now.

    Attributes:
        output: Folder for the corpus, the checkpoints and the finished model; the same command resumes from it.
        stage: The part to run; "model" is all but sampling, which alone needs the scorer.
        device: cpu or cuda; default: a GPU if there is one.
        minutes_scale: Multiplies the training minutes of both networks.
        dry_run: Take one small step of everything in OUTPUT/dry and write an untrained model there.
        start_from: Folder of a model to train further; a shallower one with fewer scales is grown.
        tokenizer: Weights of a tokenizer to start from, before those of START-FROM.
        keep_tokenizer: Leave the tokenizer as it is.
        stop_after: Minutes after which to pause behind a checkpoint, with exit status 75.
    """

    output: Annotated[Path, _OUTPUT]
    stage: Stage = "all"
    device: str | None = None
    minutes_scale: float = 1.0
    dry_run: bool = False
    start_from: Path | None = None
    tokenizer: Path | None = None
    keep_tokenizer: bool = False
    stop_after: float | None = None

    def __post_init__(self) -> None:
        """Refuses minutes that are not above 0, but for a model that is only exported."""
        is_only_exported = self.start_from is not None and self.minutes_scale == 0
        if not self.minutes_scale > 0 and not is_only_exported:
            raise FoveateError(f"--minutes-scale must be above 0, or 0 with --start-from, got {self.minutes_scale}")
        if self.keep_tokenizer and self.tokenizer is None and self.start_from is None:
            raise FoveateError("--keep-tokenizer keeps a tokenizer that is there; name it with --tokenizer")
        if self.stop_after is not None and not self.stop_after > 0:
            raise FoveateError(f"--stop-after must be above 0, got {self.stop_after}")


def train(recipe: Path, /, *, options: TrainOptions) -> int:
    """Train a model from its recipe; a run that was stopped goes on where it was.

    Args:
        recipe: A YAML file, such as recipes/emoji/configs/emoji_tiny.yaml.
        options: Where a run is kept, and how much of it happens now.
    """
    if not recipe.is_file():
        raise FoveateError(f"no recipe at {recipe}; one is recipes/emoji/configs/emoji_tiny.yaml")
    from recipes.emoji import loop, stages, start  # noqa: PLC0415 - torch is loaded when the command runs
    from recipes.emoji.recipe import Route  # noqa: PLC0415

    route = Route(
        device=options.device,
        minutes_scale=options.minutes_scale,
        keeps_tokenizer=options.keep_tokenizer,
        is_dry=options.dry_run,
    )
    begin = start.Start(model=options.start_from, tokenizer=options.tokenizer)
    try:
        made = stages.train(recipe, options.output, options.stage, _log, route, begin, options.stop_after)
    except loop.PauseError as pause:
        _log(str(pause))
        return PAUSED
    sys.stdout.write(f"{made}\n")
    return 0


def evaluate(
    corpus: Path,
    /,
    *,
    model: str = "emoji",
    prompts: int = 200,
    seed: int = 0,
    dtype: str = "float32",
    output: Annotated[Path | None, _OUTPUT] = None,
) -> int:
    """Measure a model: text match, style, composition, distance to real art, memorisation, tokenizer.

    Args:
        corpus: Folder of the drawings it was trained on: OUTPUT/corpus of train.
        model: Name or folder of the model.
        prompts: Images per figure; the card of the bundled model takes 100.
        seed: Seed of prompts and images.
        dtype: What the model computes in.
        output: Folder for model.json, model.md, and contact sheets of unselected images.
    """
    if not corpus.is_dir():
        raise FoveateError(
            f"no corpus at {corpus}; python -m recipes.emoji train RECIPE --stage corpus --output RUN builds RUN/corpus"
        )
    from recipes.emoji import evaluate as evaluation  # noqa: PLC0415 - torch is loaded when the command runs

    evaluation.run(
        evaluation.Evaluation(corpus=corpus, model=model, prompts=prompts, seed=seed, dtype=dtype), output, _log
    )
    return 0


def heads(corpus: Path, output: Path, /, *, held_out_style: str = "fluent-3d") -> int:
    """Train the two heads of text match, data/text_match.safetensors, after a check on a style left out.

    Args:
        corpus: Folder of drawings in several styles: recipes/emoji/configs/emoji_core5_corpus.yaml builds one.
        output: Safetensors file to write.
        held_out_style: Style that the check leaves out.
    """
    if not corpus.is_dir():
        raise FoveateError(f"no corpus at {corpus}; see python -m recipes.emoji train --help")
    from recipes.emoji import text_match  # noqa: PLC0415 - torch is loaded when the command runs

    check = text_match.train_text_match_heads(corpus, output, held_out_style=held_out_style)
    _log(
        f"R@1 among {check.num_ways}: {check.r_at_1:.3f} +- {check.r_at_1_spread:.3f} on {check.held_out_style}, "
        f"{check.r_at_1_train:.3f} on the styles trained on"
    )
    sys.stdout.write(f"{output}\n")
    return 0


def oracle(
    corpus: Path,
    /,
    *,
    model: str = "emoji",
    tokenizer: Path | None = None,
    budget: str = "0.25M",
    drawings: int = 24,
    choice: tuple[str, ...] = (),
) -> int:
    """Measure what a rule and a fill cost an image if all codes are the true ones: the cheapest test of an idea.

    Args:
        corpus: Folder of drawings: OUTPUT/corpus of train.
        model: Name or folder of the model whose tokenizer is asked.
        tokenizer: Weights of a tokenizer to ask instead.
        budget: Schedule of TOKENIZER: 0.06M, 0.25M, 0.60M or 1M.
        drawings: Number of drawings.
        choice: RULE:SHARE,SHARE,...:FILL with a share of tokens for each of the last scales; repeat it for several.
            Rules: mass, residual, energy, energy-fine, energy-lattice, checkerboard, random. Fills: zero, previous,
            nearest, half-nearest. Default: a table of them.
    """
    if not corpus.is_dir():
        raise FoveateError(f"no corpus at {corpus}; see python -m recipes.emoji train --help")
    if drawings < 1:
        raise FoveateError(f"--drawings must be at least 1, got {drawings}")
    from foveate.core.schedule import ScaleSchedule  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.families.loading import Origin, find_folder, find_spec  # noqa: PLC0415
    from foveate.weights.folder import AUTOENCODER  # noqa: PLC0415
    from recipes.emoji import oracle as asked  # noqa: PLC0415
    from recipes.emoji.corpus import load_corpus  # noqa: PLC0415

    choices = [asked.Choice.parse(text) for text in choice or asked.DEFAULT_CHOICES]
    origin = Origin(name_or_path=model)
    path = find_folder(origin) / AUTOENCODER if tokenizer is None else tokenizer
    schedule = find_spec(origin).default_schedule if tokenizer is None else ScaleSchedule.from_template(1.0, budget)
    made = asked.of_drawings(asked.read_autoencoder(path), schedule.grids, load_corpus(corpus), drawings)
    sys.stdout.write(asked.table(made, choices))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 bad usage or input, 75 paused, 130 interrupted.
    """
    app = App(name="python -m recipes.emoji", help=__doc__, version_flags=(), default_parameter=Parameter(negative=()))
    for command in (train, evaluate, heads, oracle):
        app.command(command)
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, FoveateError) as error:
        _log(f"recipes.emoji: {error}")
        return BAD_USAGE
    except KeyboardInterrupt:
        _log("recipes.emoji: interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _log(line: str) -> None:
    """Progress, on stderr at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
