"""`foveate sweep`: a policy at every combination of some fields' values, as a table and a plot of the frontier."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from foveate.cli.options import OUTPUT, PICTURE, CompareFlags, ModelOptions, PolicyFlag, SizeOptions, options_of
from foveate.cli.study import ControlsFlag, OverFlag, StudyOptions, checked_prompts
from foveate.pipeline.options import Options


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """What is swept, and what fails.

    Attributes:
        policy: The policy whose fields change: a name, a spec, or a YAML file.
        over: A field and its values: FIELD=LOW..HIGH, with :STEP for fractions, or FIELD=VALUE,VALUE. May be repeated:
            all combinations run. PART.FIELD names one of several parts.
        controls: Also measure trivial baselines, and say by how many dB each setting beats them.
        plot: Draw PSNR against speedup into this file, .png, .svg or .pdf; an earlier one gets a number.
        fail_if: Exit with 1 if this holds for a setting, such as "ssim.p10 < 0.88"; may be repeated.
    """

    policy: PolicyFlag
    over: OverFlag
    controls: ControlsFlag = False
    plot: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    fail_if: Annotated[list[str] | None, Parameter(group=OUTPUT)] = None


_MODEL, _SIZE, _CALL, _STUDY = ModelOptions(), SizeOptions(), CompareFlags(), StudyOptions()


def sweep(
    *,
    options: SweepOptions,
    study: StudyOptions = _STUDY,
    size: SizeOptions = _SIZE,
    call: CompareFlags = _CALL,
    model: ModelOptions = _MODEL,
) -> int:
    """Compare a policy at many settings, and plot the frontier.

    Args:
        options: What is swept, and what fails.
        study: Over what, how, and what is reported.
        size: How large the images are.
        call: How tokens are sampled.
        model: Which model runs, and on what.
    """
    prompts = checked_prompts(study, [("plot", options.plot)])
    return _sweep(prompts, {**size.options(), **options_of(call)}, model, options, study)


def _sweep(
    prompts: list[str] | None, call: Options, model: ModelOptions, options: SweepOptions, study: StudyOptions
) -> int:
    """Sweeps, prints and writes.

    Returns:
        1 if a bound of `--fail-if` holds, 130 after Ctrl-C with the prompts until then, 0 otherwise.
    """
    from foveate.cli import study_run  # noqa: PLC0415 - torch is loaded when the command runs
    from foveate.cli.loading import open_pipeline  # noqa: PLC0415
    from foveate.eval.over import grid, read_overs  # noqa: PLC0415
    from foveate.eval.sweep import draw_frontier, require_plot, sweep_settings  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    base = load_policy(options.policy)
    settings = grid(base, read_overs(options.over))
    policies = [setting.policy for setting in settings]
    if options.plot is not None:
        require_plot(options.plot)
    setup = study_run.prepare(study, prompts, call, model, policies)
    bounds = study_run.parse_bounds(options.fail_if, setup, policies, has_controls=options.controls)
    with study_run.outputs(study.html, study.csv, options.plot) as places:
        report = sweep_settings(
            open_pipeline(model, is_quiet=True),
            base,
            settings,
            setup,
            study.store,
            has_controls=options.controls,
            hides_progress=True if study.quiet else None,
        )
        comparison = report.comparison
        writers = {
            study.html: study_run.text_writer(lambda: report.page(study_run.command())),
            study.csv: study_run.text_writer(report.to_csv),
            options.plot: lambda path: draw_frontier(comparison, path, path.suffix.lstrip(".")),
        }
        return study_run.conclude(comparison, report.to_json(), study, places, writers, bounds)
