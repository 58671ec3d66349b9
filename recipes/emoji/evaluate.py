"""Evaluates a model, figure by figure, with its training art as the ceiling."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji.corpus import load_corpus
from recipes.emoji.examiner import Examiner
from recipes.emoji.figures import COLUMNS, MIN_PROMPTS, Figure
from recipes.emoji.sampling import require_scorer
from recipes.emoji.sheets import composed_sheet, single_sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What is measured, and with what.

    Attributes:
        corpus: Folder of the drawings.
        model: Name or folder of the model.
        prompts: Images per figure.
        seed: Of prompts and images.
        dtype: What the model computes in.
    """

    corpus: Path
    model: str
    prompts: int
    seed: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuses too few images and a negative seed."""
        if self.prompts < MIN_PROMPTS:
            raise FoveateError(f"--prompts must be at least {MIN_PROMPTS}, got {self.prompts}")
        if self.seed < 0:
            raise FoveateError(f"--seed must be 0 or more, got {self.seed}")


def run(evaluation: Evaluation, output: Path | None, log: Callable[[str], None]) -> None:
    """Measures; prints the figures as a table on stdout, and writes them and two sheets into a folder.

    Args:
        evaluation: What is measured.
        output: Folder for model.json, model.md, sheet.png and scenes.png, which are replaced there; None writes none.
        log: Receives progress lines.

    Raises:
        FoveateError: There is no such model, the corpus is damaged, or an extra is missing.
    """
    require_scorer()
    corpus = load_corpus(evaluation.corpus)
    pipe = Pipeline.from_pretrained(evaluation.model, dtype=evaluation.dtype)
    pipe.set_progress_bar_config(disable=True)
    examiner = Examiner(pipe=pipe, corpus=corpus, num_prompts=evaluation.prompts, seed=evaluation.seed, log=log)
    figures = list(examiner.figures())
    # Before anything is written: minutes of measuring are not lost with a file that cannot be.
    sys.stdout.write(_table(figures))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "model.json", json.dumps(_data(evaluation, figures), indent=1) + "\n")
    write_text(output / "model.md", _page(evaluation, figures))
    for name, sheet in (("sheet.png", single_sheet), ("scenes.png", composed_sheet)):
        log(name)
        with replace_file(output / name) as partial:
            sheet(examiner).save(partial, format="PNG", optimize=True)


def _data(evaluation: Evaluation, figures: list[Figure]) -> dict[str, Any]:
    return {
        "model": evaluation.model,
        "dtype": evaluation.dtype,
        "prompts": evaluation.prompts,
        "seed": evaluation.seed,
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
    }


def _table(figures: list[Figure]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(figure.cells() for figure in figures)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _page(evaluation: Evaluation, figures: list[Figure]) -> str:
    name = Path(evaluation.model).name
    command = f"python -m recipes.emoji evaluate RUN/corpus --model {name} --prompts {evaluation.prompts}"
    return (
        f"# Every figure of {name}\n\n`{command} --dtype {evaluation.dtype}`, seed {evaluation.seed}. "
        f'"Real art" is the same check on drawings and composites of the corpus: its ceiling.\n\n{_table(figures)}'
    )
