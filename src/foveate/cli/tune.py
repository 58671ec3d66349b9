"""`foveate tune`: the best setting of a policy that holds bounds, proved on held-out prompts, as a YAML file."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from foveate.cli.console import note, print_gap, print_json, print_paths, print_table, warn
from foveate.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PICTURE,
    POLICY,
    CompareFlags,
    ModelOptions,
    PolicyFlag,
    SizeOptions,
    options_of,
)
from foveate.cli.study import ControlsFlag, OverFlag, StudyOptions, checked_prompts
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.pipeline.options import Options

if TYPE_CHECKING:
    import foveate.eval.tune  # Named in full in an annotation, which the tests check: they import what stands there.


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """What is sought, and where it is written.

    Attributes:
        policy: The policy whose fields change: a name, a spec, or a YAML file.
        over: A field and its range: FIELD=LOW..HIGH[:STEP], or FIELD=VALUE,VALUE. May be repeated. PART.FIELD names one
            of several parts.
        subject_to: A bound that has to hold, such as "psnr.p10 >= 27"; may be repeated. The figures are listed below.
        minimize: Figure that shall be small; default: latency_ms.median.
        maximize: Figure that shall be large, instead.
        trials: Settings that are tried at most.
        held_out: A file with prompts that only judge; default: every second one of the prompts.
        controls: Also measure trivial baselines on the held-out prompts.
        output: Write the winner to this YAML file, with where it comes from; an earlier one gets a number.
    """

    policy: PolicyFlag
    over: OverFlag
    subject_to: Annotated[list[str], Parameter(group=POLICY)]
    minimize: Annotated[str | None, Parameter(group=POLICY)] = None
    maximize: Annotated[str | None, Parameter(group=POLICY)] = None
    trials: Annotated[int, Parameter(group=MEASUREMENT)] = 20
    held_out: Annotated[Path | None, Parameter(group=PICTURE)] = None
    controls: ControlsFlag = False
    output: Annotated[Path, Parameter(name=["--output", "-o"], group=OUTPUT)]


_MODEL, _SIZE, _CALL, _STUDY = ModelOptions(), SizeOptions(), CompareFlags(), StudyOptions()


def tune(
    *,
    options: TuneOptions,
    study: StudyOptions = _STUDY,
    size: SizeOptions = _SIZE,
    call: CompareFlags = _CALL,
    model: ModelOptions = _MODEL,
) -> int:
    """Find the fastest setting of a policy that holds a bound, and write it as YAML.

    Trials and measurements go to --store, by default a folder named like the YAML file with .study behind it; the same
    command goes on there.

    Args:
        options: What is sought, and where it is written.
        study: Over what, how, and what is reported.
        size: How large the images are.
        call: How tokens are sampled.
        model: Which model runs, and on what.
    """
    if options.output.suffix not in (".yaml", ".yml"):
        raise FoveateError(f"--output must end with .yaml, so that it can be given as --policy; got {options.output}")
    if study.store is None and os.path.isfile(_folder(options, study)):
        raise FoveateError(f"{_folder(options, study)} is a file; name a folder with --store")
    prompts = checked_prompts(study, [("output", options.output)])
    held_out = None if options.held_out is None else read_prompt_file(options.held_out)
    return _tune(prompts, held_out, {**size.options(), **options_of(call)}, model, options, study)


def _folder(options: TuneOptions, study: StudyOptions) -> Path:
    return study.store or options.output.with_suffix(".study")


def _tune(
    prompts: list[str] | None,
    held_out: list[str] | None,
    call: Options,
    model: ModelOptions,
    options: TuneOptions,
    study: StudyOptions,
) -> int:
    """Searches, prints and writes.

    Returns:
        1 if no setting holds the bounds on the held-out prompts, 0 otherwise.
    """
    from foveate.cli import study_run  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.cli.loading import open_pipeline  # noqa: PLC0415
    from foveate.eval.tune import few_prompts, run_tuning  # noqa: PLC0415

    told = _told(prompts, held_out, call, model, options, study)
    folder = _folder(options, study)
    with study_run.outputs(study.html, study.csv, options.output) as places:
        try:
            report = run_tuning(
                open_pipeline(model, is_quiet=True), told, folder, hides_progress=True if study.quiet else None
            )
        except KeyboardInterrupt:
            note(f"what was measured is in {folder}; the same command goes on there")
            raise
        comparison = report.held_out
        if study.as_json:
            print_json(report.to_json())
        elif comparison is not None:
            print_table(*comparison.table())
        rough = few_prompts(len(told.held_out.prompts))
        if rough is not None:
            warn(rough)
        note(report.verdict())
        writers: dict[Path | None, Callable[[Path], object]] = {}
        if comparison is not None:
            writers |= {
                study.html: study_run.text_writer(lambda: report.page(study_run.command())),
                study.csv: study_run.text_writer(comparison.to_csv),
            }
        if report.winner is not None:
            writers |= {options.output: study_run.text_writer(lambda: report.yaml(study_run.command()))}
        written = places.write(writers)
        if written and not study.as_json:
            print_gap()
            print_paths(written)
    return 0 if report.winner is not None else 1


def _told(
    prompts: list[str] | None,
    held_out: list[str] | None,
    call: Options,
    model: ModelOptions,
    options: TuneOptions,
    study: StudyOptions,
) -> "foveate.eval.tune.Tuning":
    """Everything that the search is told; refuses what can be refused without weights."""
    from foveate.cli import study_run  # noqa: PLC0415
    from foveate.cli.loading import spec_of  # noqa: PLC0415
    from foveate.eval.over import read_overs, with_values  # noqa: PLC0415
    from foveate.eval.store import check_store  # noqa: PLC0415
    from foveate.eval.tune import Tuning, read_goal, split_prompts  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    base, overs = load_policy(options.policy), read_overs(options.over)
    for over in overs:
        first = over.values[0] if over.values else str(over.low)
        with_values(base, {over.field: first})
    setup = study_run.prepare(replace(study, store=None), prompts, call, model, [base])
    choosing, judging = split_prompts(setup.prompts, held_out)
    told = Tuning(
        base=base,
        overs=overs,
        goal=read_goal(options.minimize, options.maximize, options.subject_to, setup.judges),
        tuning=replace(setup, prompts=tuple(choosing)),
        held_out=replace(setup, prompts=tuple(judging)),
        trials=options.trials,
        has_controls=options.controls,
    )
    folder, spec = _folder(options, study), spec_of(model)
    for place, config in (
        (folder, {**told.config(), "model": spec.name}),
        (folder / "tuning", told.tuning.config(spec)),
        (folder / "held-out", told.held_out.config(spec)),
    ):
        check_store(place, config, is_partial=True)
    return told
