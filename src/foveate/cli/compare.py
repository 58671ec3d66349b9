"""`foveate compare`: fidelity, time and FLOPs of any number of policies beside another one, over the same prompts.

With `--manifest`, of two runs of `foveate batch`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import OUTPUT, PICTURE, POLICY, CompareFlags, ModelOptions, SizeOptions, ignored, options_of
from foveate.cli.study import ControlsFlag, PoliciesFlag, StudyOptions, check_files, checked_prompts
from foveate.core.errors import FoveateError
from foveate.pipeline.options import Options

_FIT = ("manifest", "scores", "prompts_set", "fail_if", "judge", "batch_size", "html", "csv", "as_json", "quiet",
        "config")  # fmt: skip
"""What may stand beside `--manifest`."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What is compared, and what fails.

    Attributes:
        policy: A policy in question: a name, a spec such as skip-scales:count=2, or a YAML file; may be repeated.
        controls: Also measure trivial baselines, and say by how many dB each policy beats them.
        fail_if: Exit with 1 if this holds for a policy, such as "ssim.p10 < 0.88", or for the one it names, such as
            "skip-scales psnr.mean < 25"; may be repeated. The figures are listed below.
        manifest: Compare finished runs instead: the output folder of a run of foveate batch; given twice, the
            reference first.
        scores: What the scorer of --prompts-set wrote for a run; given twice, in the order of --manifest.
        prompts_set: Whose scorer wrote --scores: geneval, dpg, parti, drawbench, hps or imagereward.
    """

    policy: PoliciesFlag | None = None
    controls: ControlsFlag = False
    fail_if: Annotated[list[str] | None, Parameter(group=OUTPUT)] = None
    manifest: Annotated[list[Path] | None, Parameter(group=POLICY)] = None
    scores: Annotated[list[Path] | None, Parameter(group=POLICY)] = None
    prompts_set: Annotated[str | None, Parameter(group=POLICY)] = None


_MODEL, _SIZE, _CALL, _STUDY = ModelOptions(), SizeOptions(), CompareFlags(), StudyOptions()
_OPTIONS = CompareOptions()


def compare(
    *,
    options: CompareOptions = _OPTIONS,
    study: StudyOptions = _STUDY,
    size: SizeOptions = _SIZE,
    call: CompareFlags = _CALL,
    model: ModelOptions = _MODEL,
) -> int:
    """Compare policies with another one: image fidelity and speedup.

    Args:
        options: What is compared, and what fails.
        study: Over what, how, and what is reported.
        size: How large the images are.
        call: How tokens are sampled.
        model: Which model runs, and on what.
    """
    if options.manifest is not None:
        found = ignored(((options, _OPTIONS), (study, _STUDY), (size, _SIZE), (call, _CALL), (model, _MODEL)), _FIT)
        if found:
            raise FoveateError(
                f"--manifest compares images that were generated, so {', '.join(found)} would be ignored; leave it out"
            )
        return _compare_runs(options, study)
    _refuse_without_manifest(options)
    prompts = checked_prompts(study)
    return _compare(prompts, {**size.options(), **options_of(call)}, model, options, study)


def _refuse_without_manifest(options: CompareOptions) -> None:
    """Refuses what only runs have, and a comparison of nothing."""
    for flag, value in (("--scores", options.scores), ("--prompts-set", options.prompts_set)):
        if value is not None:
            raise FoveateError(f"{flag} belongs to runs that were generated; add --manifest RUN twice, or leave it out")
    if options.policy is None:
        raise FoveateError("compare needs --policy, or --manifest twice for runs that were generated")


def _compare_runs(options: CompareOptions, study: StudyOptions) -> int:
    """Compares two runs, prints and writes.

    Returns:
        As `_compare`.
    """
    manifest, scores = options.manifest or [], options.scores or []
    if len(manifest) != 2:  # noqa: PLR2004 - as the message says
        raise FoveateError(f"--manifest must be given twice, the reference first, got {len(manifest)}")
    if (options.prompts_set is None) != (not scores):
        raise FoveateError("--scores and --prompts-set belong together: whose scorer wrote which files")
    if len(scores) not in (0, 2):
        raise FoveateError(f"--scores must be given twice, in the order of --manifest, got {len(scores)}")
    check_files(study)
    from foveate.cli.compare_runs import run  # noqa: PLC0415 - torch is loaded when the command runs

    reference, other = manifest
    return run((reference, other), scores, options.prompts_set, options.fail_if or [], study)


def _compare(
    prompts: list[str] | None, call: Options, model: ModelOptions, options: CompareOptions, study: StudyOptions
) -> int:
    """Compares, prints and writes.

    Returns:
        1 if a bound of `--fail-if` holds, 130 after Ctrl-C with the prompts until then, 0 otherwise.
    """
    from foveate.cli import study_run  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.cli.loading import open_pipeline  # noqa: PLC0415
    from foveate.eval.compare import compare_policies  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    policies = [load_policy(policy) for policy in options.policy or []]
    setup = study_run.prepare(study, prompts, call, model, policies)
    bounds = study_run.parse_bounds(options.fail_if, setup, policies, has_controls=options.controls)
    with study_run.outputs(study.html, study.csv) as places:
        report = compare_policies(
            open_pipeline(model, is_quiet=True),
            policies,
            setup,
            study.store,
            has_controls=options.controls,
            hides_progress=True if study.quiet else None,
        )
        writers = {
            study.html: study_run.text_writer(lambda: report.page(study_run.command())),
            study.csv: study_run.text_writer(report.to_csv),
        }
        return study_run.conclude(report, report.to_json(), study, places, writers, bounds)
