"""What `foveate compare` does once its flags are read: runs both policies, reports, and checks bounds."""

import re
from collections.abc import Sequence

from foveate.cli.compare import CompareOptions
from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.loading import open_pipeline
from foveate.cli.options import ModelOptions
from foveate.cli.staging import Staging
from foveate.core.errors import FoveateError
from foveate.eval.compare import ComparisonReport, compare
from foveate.policies.registry import load_policy

_BOUND = re.compile(r"\s*([a-z_]+(?:\.[a-z0-9_]+)?)\s*(?:>=|<=|==|>|<)\s*-?\d+(?:\.\d+)?\s*")
_STATISTICS = ("mean", "p10", "min")
_PARTS = ("transformer", "decoder", "end_to_end")
_FIGURES = (
    "n", "identical", "yardstick_psnr", "flops_ratio", *(f"psnr.{name}" for name in _STATISTICS),
    *(f"ssim.{name}" for name in _STATISTICS), *(f"speedup.{name}" for name in _PARTS),
)  # fmt: skip
"""What a bound can be about; a typing error must not be found after minutes of drawing."""


def run(prompts: Sequence[str], model: ModelOptions, options: CompareOptions) -> int:
    """Compares, prints and writes the report.

    Returns:
        1 if a bound of `--fail-if` holds, 0 otherwise.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written.
    """
    bounds = options.fail_if or []
    figures = [check_bound(bound) for bound in bounds]
    policy, against = load_policy(options.policy), load_policy(options.against)
    with Staging(options.html.parent if options.html is not None else None) as staging:
        pipe = open_pipeline(model, is_quiet=options.quiet)
        report = compare(
            pipe,
            policy,
            list(prompts),
            options.seeds,
            against,
            runs=options.runs,
            first_seed=options.seed,
            batch_size=options.batch_size,
        )
        if options.html is not None:
            report.to_html(staging.path(options.html.name))
            staging.publish()
    _print(report, options)
    failed = [(bound, name) for bound, name in zip(bounds, figures, strict=True) if report.check(bound)]
    for bound, name in failed:
        warn(f"{bound} holds: {name} is {report.figures()[name]:.4g}")
    return 1 if failed else 0


def check_bound(bound: str) -> str:
    """Reads a bound before anything is drawn; returns the figure that it is about.

    Raises:
        FoveateError: It is not written as figure, comparison, number, or there is no such figure.
    """
    match = _BOUND.fullmatch(bound)
    if match is None:
        raise FoveateError(f'--fail-if is written like "ssim.p10 < 0.88", got {bound!r}')
    if match[1] not in _FIGURES:
        raise FoveateError(f"--fail-if knows no figure {match[1]!r}; there are {', '.join(_FIGURES)}")
    return match[1]


def _print(report: ComparisonReport, options: CompareOptions) -> None:
    if options.as_json:
        print_json(report.to_json())
        return
    figures = report.figures()

    def statistics(name: str, unit: str) -> str:
        return ", ".join(f"{part} {figures[f'{name}.{part}']:.3g}{unit}" for part in _STATISTICS)

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
    print_paths([options.html] if options.html is not None else [])
