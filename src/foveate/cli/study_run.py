"""What `compare`, `sweep` and `tune` do alike: refuse early, write files complete or not at all, print, and say a code.

It imports torch, so commands import it when they run.
"""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.cli.console import note, print_gap, print_json, print_paths, print_table, warn
from foveate.cli.loading import check_call, spec_of
from foveate.cli.main import INTERRUPTED
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.cli.study import BUILT_IN_CLASSES, BUILT_IN_PROMPTS, StudyOptions
from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.eval.bounds import FigureBound, figures_of
from foveate.eval.compare import refuse_without_extra
from foveate.eval.controls import CONTROLS
from foveate.eval.judges import load_judge
from foveate.eval.measure import Setup
from foveate.eval.page import notes as notes_on
from foveate.eval.report import ComparisonReport
from foveate.eval.store import check_store
from foveate.pipeline.call import draws_classes
from foveate.pipeline.options import Options
from foveate.policies.registry import load_policy

Writers = Mapping[Path | None, Callable[[Path], object]]
"""Files to write, and what writes each; None is a file that nobody asked for."""


def prepare(
    study: StudyOptions, prompts: list[str] | None, call: Options, model: ModelOptions, policies: Sequence[Policy]
) -> Setup:
    """What every policy generates; refuses everything that can be refused without weights.

    Raises:
        FoveateError: An unknown model or judge, an option out of range, a policy that does not fit, or a store of other
            settings.
    """
    refuse_without_extra()
    spec = spec_of(model)
    against = load_policy(study.against)
    setup = Setup(
        prompts=tuple(prompts or (BUILT_IN_CLASSES if draws_classes(spec) else BUILT_IN_PROMPTS)),
        seeds=study.seeds,
        first_seed=study.seed,
        against=against,
        runs=study.runs,
        batch_size=study.batch_size,
        options=call,
        judges=tuple(load_judge(name) for name in study.judge or []),
    )
    own: Options = {"num_images_per_prompt": study.seeds, "seed": study.seed}
    check_call(list(setup.prompts), {**call, **own}, [*policies, against], spec)
    if study.store is not None:
        check_store(study.store, setup.config(spec), is_partial=True)
    return setup


def parse_bounds(
    texts: Sequence[str] | None, setup: Setup, policies: Sequence[Policy], *, has_controls: bool
) -> tuple[FigureBound, ...]:
    """Bounds as they were written; what could not be judged in the end is refused now.

    Raises:
        FoveateError: No bound, no such figure, a policy that is not compared, or a figure that is not measured here.
    """
    found = tuple(FigureBound.parse(text, figures_of(setup.judges)) for text in texts or [])
    specs = [policy.spec for policy in policies]
    there = {*specs, *([load_policy(spec).spec for spec in CONTROLS] if has_controls else [])}
    for bound in found:
        if bound.policy is not None and bound.policy not in there:
            raise FoveateError(f"{bound.text}: {bound.policy} is not compared; there are {', '.join(specs)}")
        if bound.is_interval and len(setup.prompts) < 2:  # noqa: PLR2004 - as the message says
            raise FoveateError(
                f"{bound.text}: an interval needs two prompts or more; give more, or bound the figure itself"
            )
        if bound.is_interval and bound.figure.startswith("speedup.") and len(setup.batches) < 2:  # noqa: PLR2004
            raise FoveateError(
                f"{bound.text}: an interval of a speedup needs two calls or more, and all prompts are one; lower "
                "--batch-size"
            )
        if bound.figure == "beats_controls_by_db" and not has_controls:
            raise FoveateError(f"{bound.text}: there are no controls; add --controls")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Places for files that were asked for by name."""

    staged: Mapping[Path, Staging]

    def write(self, writers: Writers) -> list[Path]:
        """Writes and publishes files; returns their paths."""
        written = []
        for path, write in writers.items():
            if path is not None:
                write(self.staged[path].path(path.name))
                written.append(self.staged[path].publish()[path.name])
        return written


@contextmanager
def outputs(*paths: Path | None) -> Iterator[Outputs]:
    """Checks that all of these files can be written, before any work is done.

    Raises:
        FoveateError: One cannot.
    """
    with ExitStack() as stack:
        wanted = [path for path in paths if path is not None]
        yield Outputs(staged={path: stack.enter_context(Staging(path.parent, [path.name])) for path in wanted})


def command() -> str:
    """What was typed."""
    return shlex.join(["foveate", *sys.argv[1:]])


def conclude(
    report: ComparisonReport,
    data: Mapping[str, Any],
    study: StudyOptions,
    places: Outputs,
    writers: Writers,
    bounds: Sequence[FigureBound] = (),
) -> int:
    """Writes files, prints, and judges bounds.

    Returns:
        130 if Ctrl-C ended it early, 1 if a bound holds, 0 otherwise.
    """
    failed = (found for bound in bounds for found in _failures(report, bound))
    has_failed = show(report.table(), data, study, places, writers, notes=notes_on(report), failed=failed)
    if report.is_interrupted:
        where = (
            "with --store FOLDER it can go on" if study.store is None else f"the same command goes on in {study.store}"
        )
        note(f"interrupted; {where}")
        return INTERRUPTED
    return 1 if has_failed else 0


def show(
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    data: Mapping[str, Any],
    study: StudyOptions,
    places: Outputs,
    writers: Writers,
    *,
    notes: Iterable[str],
    failed: Iterable[str],
) -> bool:
    """Prints a result, warns, and writes files.

    Minutes of measuring are not lost with a file that cannot be written: the result is printed first.

    Returns:
        Whether there was a line in `failed`, which is asked last.
    """
    if study.as_json:
        print_json(data)
    else:
        print_table(*table)
    for line in notes:
        warn(line)
    written = places.write(writers)
    if written and not study.as_json:
        print_gap()
        print_paths(written)
    has_failed = False
    for line in failed:
        warn(line)
        has_failed = True
    return has_failed


def _failures(report: ComparisonReport, bound: FigureBound) -> Iterator[str]:
    """A line for every policy that a bound holds for."""
    for spec, value in report.holding(bound):
        whose = "" if len(report.policies) == 1 and bound.policy is None else f" for {spec}"
        yield f"{bound.text} holds: {bound.figure} is {value:.4g}{whose}"


def text_writer(text: Callable[[], str]) -> Callable[[Path], object]:
    """Writes what a function gives, in UTF-8."""
    return lambda path: path.write_text(text(), encoding="utf-8")
