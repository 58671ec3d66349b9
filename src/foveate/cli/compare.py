"""`foveate compare`: fidelity, time and FLOPs of any number of policies beside another one, over the same prompts."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import OUTPUT, PICTURE, CompareFlags, ModelOptions, SizeOptions, options_of
from foveate.cli.study import ControlsFlag, PoliciesFlag, StudyOptions, checked_prompts
from foveate.pipeline.options import Options


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What is compared, and what fails.

    Attributes:
        policy: A policy in question: a name, a spec such as skip-scales:count=2, or a YAML file; may be repeated.
        controls: Also measure trivial baselines, and say by how many dB each policy beats them.
        fail_if: Exit with 1 if this holds for a policy, such as "ssim.p10 < 0.88", or for the one it names, such as
            "skip-scales psnr.mean < 25"; may be repeated. The figures are listed below.
    """

    policy: PoliciesFlag
    controls: ControlsFlag = False
    fail_if: Annotated[list[str] | None, Parameter(group=OUTPUT)] = None


_MODEL, _SIZE, _CALL, _STUDY = ModelOptions(), SizeOptions(), CompareFlags(), StudyOptions()


def compare(
    *,
    options: CompareOptions,
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
    prompts = checked_prompts(study)
    return _compare(prompts, {**size.options(), **options_of(call)}, model, options, study)


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

    policies = [load_policy(policy) for policy in options.policy]
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
