"""What `foveate eval` does once its flags are read: measures, draws the sheets, prints, writes."""

import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foveate.cli.console import SCHEMA_VERSION, print_json, print_paths, print_table
from foveate.cli.evaluate import EvalOptions
from foveate.cli.loading import open_pipeline
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.eval.figures import COLUMNS, Figure
from foveate.train.corpus import load_corpus
from foveate.train.examiner import Examiner
from foveate.train.sheets import composed_sheet, single_sheet

FILES = ("model.json", "model.md", "sheet.png", "scenes.png")


def run(what: str, model: ModelOptions, options: EvalOptions) -> int:
    """Measures, prints and writes.

    Raises:
        FoveateError: A flag is out of range, the corpus is damaged, or an extra is missing.
    """

    def log(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    corpus = load_corpus(options.corpus)
    with Staging(options.output, FILES) as staging:
        examiner = Examiner(
            pipe=open_pipeline(model, is_quiet=True),
            corpus=corpus,
            num_prompts=options.prompts,
            seed=options.seed,
            log=log,
        )
        figures = list(examiner.figures())
        data = _data(what, model, options, figures)
        written: Collection[Path] = ()
        try:
            if options.output is not None:
                log("sheets")
                staging.path("model.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                staging.path("model.md").write_text(_markdown(model, options, figures), encoding="utf-8")
                single_sheet(examiner).save(staging.path("sheet.png"), optimize=True)
                composed_sheet(examiner).save(staging.path("scenes.png"), optimize=True)
                written = staging.publish().values()
        finally:
            # Minutes of measuring are not lost with a file that cannot be written.
            if options.as_json:
                print_json(data)
            else:
                print_table(COLUMNS, [figure.cells() for figure in figures])
                print_paths(written)
    return 0


def _data(what: str, model: ModelOptions, options: EvalOptions, figures: list[Figure]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "what": what,
        "model": str(model.model),
        "dtype": model.dtype,
        "prompts": options.prompts,
        "seed": options.seed,
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
    }


def _markdown(model: ModelOptions, options: EvalOptions, figures: list[Figure]) -> str:
    name = Path(model.model).name
    lines = [
        f"# Every figure of {name}",
        "",
        f"`foveate eval default-model --model {name} --dtype {model.dtype} "
        f"--corpus RUN/corpus --prompts {options.prompts}`, "
        f'seed {options.seed}. "Real art" is the same check on drawings and composites of the corpus: its ceiling.',
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(figure.cells())} |" for figure in figures),
    ]
    return "\n".join(lines) + "\n"
