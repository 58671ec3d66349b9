"""`foveate compare`: fidelity, time and FLOPs of one policy beside another, over the same prompts and seeds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from foveate.cli.console import print_facts, print_json, print_paths, warn
from foveate.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PICTURE,
    POLICY,
    CompareFlags,
    ConfigFlag,
    JsonFlag,
    ModelOptions,
    PolicyFlag,
    QuietFlag,
    SizeOptions,
    options_of,
)
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.pipeline.options import Options

BUILT_IN_PROMPTS = (
    "green apple",
    "watermelon",
    "taco",
    "doughnut",
    "dolphin",
    "turtle",
    "owl",
    "zebra",
    "hibiscus",
    "evergreen tree",
    "sailboat",
    "fire engine",
    "soccer ball",
    "microphone",
    "top hat",
    "backpack",
)
"""The prompts if no file of prompts is given: single solid objects of all large groups, which the bundled model was
trained on."""

BUILT_IN_CLASSES = (
    "granny smith",
    "pineapple",
    "cheeseburger",
    "bagel",
    "killer whale",
    "loggerhead",
    "great grey owl",
    "zebra",
    "daisy",
    "lighthouse",
    "yawl",
    "fire engine",
    "soccer ball",
    "microphone",
    "bow tie",
    "backpack",
)
"""Prompts for models of ImageNet classes."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """What is compared, over what, and what is reported.

    Attributes:
        prompts: A file with one prompt a line, or - for stdin; default: 16 common objects, or 16 classes for VAR.
        seeds: Images per prompt.
        seed: First seed of every prompt.
        policy: The policy in question: a name, a spec such as skip-scales:count=2, or a YAML file.
        against: The policy to compare with.
        runs: How often each side is timed.
        batch_size: Images generated as one batch at most.
        html: Write a report with images to this file; an earlier one gets a number.
        fail_if: Exit with 1 if this holds, such as "ssim.p10 < 0.88"; may be repeated. The figures are listed below.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    prompts: Path | None = None
    seeds: int = 1
    seed: int = 0
    policy: PolicyFlag
    against: Annotated[str, Parameter(group=POLICY)] = "full"
    runs: Annotated[int, Parameter(group=MEASUREMENT)] = 3
    batch_size: Annotated[int, Parameter(group=MEASUREMENT)] = 8
    html: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    fail_if: Annotated[list[str] | None, Parameter(group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None


_MODEL, _SIZE, _CALL = ModelOptions(), SizeOptions(), CompareFlags()


def compare(
    *,
    options: CompareOptions,
    size: SizeOptions = _SIZE,
    call: CompareFlags = _CALL,
    model: ModelOptions = _MODEL,
) -> int:
    """Compare a policy with another one: image fidelity and speedup.

    Args:
        options: What is compared, over what, and what is reported.
        size: How large the images are.
        call: How tokens are sampled.
        model: Which model runs, and on what.
    """
    for flag in ("seeds", "runs", "batch_size"):
        if getattr(options, flag) < 1:
            raise FoveateError(f"--{flag.replace('_', '-')} must be 1 or more, got {getattr(options, flag)}")
    if options.html is not None and os.path.isdir(options.html):
        raise FoveateError(f"--html must be a file, {options.html} is a folder")
    prompts = None if options.prompts is None else read_prompt_file(options.prompts)
    return _compare(prompts, {**size.options(), **options_of(call)}, model, options)


def _compare(prompts: list[str] | None, call: Options, model: ModelOptions, options: CompareOptions) -> int:
    """Compares, prints and writes the report; no prompts stand for the built-in ones.

    Returns:
        1 if a bound of `--fail-if` holds, 0 otherwise.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written.
    """
    from foveate.cli.loading import check_call, open_pipeline, spec_of  # noqa: PLC0415 - torch is loaded when it runs
    from foveate.cli.staging import Staging  # noqa: PLC0415
    from foveate.eval import compare as comparison  # noqa: PLC0415
    from foveate.pipeline.call import draws_classes  # noqa: PLC0415
    from foveate.policies.registry import load_policy  # noqa: PLC0415

    # A typing error must not be found after minutes of generating.
    bounds = [(text, comparison.FigureBound.parse(text)) for text in options.fail_if or []]
    policies = (load_policy(options.policy), load_policy(options.against))
    comparison.refuse_without_extra()
    spec = spec_of(model)
    texts = prompts or list(BUILT_IN_CLASSES if draws_classes(spec) else BUILT_IN_PROMPTS)
    own: Options = {"num_images_per_prompt": options.seeds, "seed": options.seed}
    check_call(texts, {**call, **own}, policies, spec)
    with Staging(None) if options.html is None else Staging(options.html.parent, [options.html.name]) as staging:
        report = comparison.compare(
            open_pipeline(model, is_quiet=options.quiet),
            policies[0],
            texts,
            options.seeds,
            policies[1],
            runs=options.runs,
            first_seed=options.seed,
            batch_size=options.batch_size,
            options=call,
        )
        data, figures = report.to_json(), report.figures()
        written: list[Path] = []
        try:
            if options.html is not None:
                report.to_html(staging.path(options.html.name))
                written.append(staging.publish()[options.html.name])
        finally:
            # Minutes of measuring are not lost with a file that cannot be written.
            if options.as_json:
                print_json(data)
            else:
                print_facts(_facts(data, figures, comparison.STATISTICS))
                print_paths(written)
    failed = [(text, bound.figure) for text, bound in bounds if bound.holds(figures)]
    for text, name in failed:
        warn(f"{text} holds: {name} is {figures[name]:.4g}")
    return 1 if failed else 0


def _facts(data: Mapping[str, Any], figures: Mapping[str, float], parts: tuple[str, ...]) -> list[tuple[str, str]]:
    """The short table for people."""

    def statistics(name: str, unit: str) -> str:
        return ", ".join(f"{part} {figures[f'{name}.{part}']:.3g}{unit}" for part in parts)

    speedup, count = data["speedup"], len(data["images"])
    return [
        ("compared", f"{data['policy']} with {data['against']}, {count} images, {data['runs']} runs"),
        ("PSNR", f"{statistics('psnr', ' dB')}; another seed has {data['yardstick_psnr']:.3g} dB"),
        ("SSIM", statistics("ssim", "")),
        ("identical", f"{figures['identical']:.0f} of {count}"),
        ("speedup", f"{speedup['end_to_end']:.2f}x, transformer {speedup['transformer']:.2f}x"),
        ("FLOPs", f"{data['flops_ratio']:.1%} of all"),
    ]
