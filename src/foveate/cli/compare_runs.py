"""`foveate compare --manifest`: two runs of `foveate batch`, with everything that it prints and writes.

It imports torch, so `compare` imports it when it runs.
"""

from collections.abc import Sequence
from pathlib import Path

from foveate.bulk.compare import compare_runs
from foveate.bulk.output import OutputFolder
from foveate.bulk.runs_report import parse_bounds
from foveate.bulk.scores import Scores
from foveate.bulk.sets import find_set, read_scores
from foveate.cli.console import note
from foveate.cli.main import INTERRUPTED
from foveate.cli.study import StudyOptions
from foveate.cli.study_run import command, outputs, show, text_writer
from foveate.eval.compare import refuse_without_extra
from foveate.eval.judges import load_judge
from foveate.eval.measure import check_judges


def run(
    manifests: tuple[Path, Path],
    scores: Sequence[Path],
    prompts_set: str | None,
    fail_if: Sequence[str],
    study: StudyOptions,
) -> int:
    """Compares two runs; what can be refused is refused before anything is scored.

    Returns:
        1 if a bound of `--fail-if` holds, 130 after Ctrl-C with the pairs until then, 0 otherwise.
    """
    refuse_without_extra()
    judges = tuple(load_judge(name) for name in study.judge or [])
    check_judges(judges)
    reference, other = map(OutputFolder.read, manifests)
    scored = None if prompts_set is None else _read_both(prompts_set, scores)
    bounds = parse_bounds(fail_if, judges, scored)
    with outputs(study.html, study.csv) as places:
        report = compare_runs(
            reference,
            other,
            judges=judges,
            batch_size=study.batch_size,
            scores=scored,
            hides_progress=True if study.quiet else None,
        )
        failed = (
            f"{bound.text} holds: {bound.figure} is {value:.4g}"
            for bound in bounds
            for _, value in report.holding(bound)
        )
        writers = {
            study.html: text_writer(lambda: report.page(command())),
            study.csv: text_writer(report.to_csv),
        }
        has_failed = show(report.table(), report.to_json(), study, places, writers, notes=report.notes(), failed=failed)
    if report.is_interrupted:
        note("interrupted; run the same command again for all pairs")
        return INTERRUPTED
    return 1 if has_failed else 0


def _read_both(prompts_set: str, scores: Sequence[Path]) -> tuple[Scores, Scores]:
    """The scores of the reference and of the other run."""
    found = find_set(prompts_set)
    reference, other = (read_scores(found, path) for path in scores)
    return reference, other
