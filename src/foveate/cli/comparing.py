"""What `foveate compare` does once its flags are read: runs both policies, reports, and checks bounds."""

from collections.abc import Sequence
from pathlib import Path

from foveate.cli.compare import CompareOptions
from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.loading import call_options, open_pipeline
from foveate.cli.options import ModelOptions, SamplingOptions, SizeOptions
from foveate.cli.prompts import BUILT_IN_CLASSES, BUILT_IN_PROMPTS
from foveate.cli.staging import Staging
from foveate.eval.compare import STATISTICS, ComparisonReport, FigureBound, compare
from foveate.families.spec import ModelSpec
from foveate.pipeline.call import draws_classes
from foveate.policies.registry import load_policy


def run(
    prompts: Sequence[str] | None,
    model: ModelOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    options: CompareOptions,
) -> int:
    """Compares, prints and writes the report; no prompts stand for the built-in ones.

    Returns:
        1 if a bound of `--fail-if` holds, 0 otherwise.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written.
    """
    # A typing error must not be found after minutes of drawing.
    bounds = [(text, FigureBound.parse(text)) for text in options.fail_if or []]
    policy, against = load_policy(options.policy), load_policy(options.against)
    call = call_options(size, sampling)
    with _staging(options) as staging:
        pipe = open_pipeline(model, is_quiet=options.quiet)
        report = compare(
            pipe,
            policy,
            built_in(pipe.model.spec) if prompts is None else list(prompts),
            options.seeds,
            against,
            runs=options.runs,
            first_seed=options.seed,
            batch_size=options.batch_size,
            options=call,
        )
        written = None
        try:
            written = _write(staging, report, options)
        finally:
            # Minutes of measuring are not lost with a file that cannot be written.
            _print(report, written, options)
    figures = report.figures()
    failed = [(text, bound.figure) for text, bound in bounds if bound.holds(figures)]
    for text, name in failed:
        warn(f"{text} holds: {name} is {figures[name]:.4g}")
    return 1 if failed else 0


def _staging(options: CompareOptions) -> Staging:
    return Staging(None) if options.html is None else Staging(options.html.parent, [options.html.name])


def _write(staging: Staging, report: ComparisonReport, options: CompareOptions) -> Path | None:
    """Writes the page, if one is wanted; returns where it is."""
    if options.html is None:
        return None
    report.to_html(staging.path(options.html.name))
    return staging.publish()[options.html.name]


def built_in(spec: ModelSpec) -> list[str]:
    """What a model draws where no prompts are given."""
    return list(BUILT_IN_CLASSES if draws_classes(spec) else BUILT_IN_PROMPTS)


def _print(report: ComparisonReport, written: Path | None, options: CompareOptions) -> None:
    if options.as_json:
        print_json(report.to_json())
        return
    figures = report.figures()

    def statistics(name: str, unit: str) -> str:
        return ", ".join(f"{part} {figures[f'{name}.{part}']:.3g}{unit}" for part in STATISTICS)

    speedup = report.speedup
    print_facts(
        [
            ("compared", f"{report.policy} with {report.against}, {len(report.rows)} pictures, {report.runs} runs"),
            ("PSNR", f"{statistics('psnr', ' dB')}; another seed has {report.yardstick_psnr:.3g} dB"),
            ("SSIM", statistics("ssim", "")),
            ("identical", f"{figures['identical']:.0f} of {len(report.rows)}"),
            ("speedup", f"{speedup.end_to_end:.2f}x, transformer {speedup.transformer:.2f}x"),
            ("FLOPs", f"{report.flops_ratio:.1%} of all"),
        ]
    )
    print_paths([written] if written is not None else [])
