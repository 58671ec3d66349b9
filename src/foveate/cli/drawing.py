"""What `foveate generate` does once its flags are read: draws, writes the files together and reports."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from foveate.cli.console import in_units, note, print_facts, print_json, print_paths
from foveate.cli.generate import GenerateOptions
from foveate.cli.loading import call_options, open_pipeline
from foveate.cli.options import ModelOptions, SamplingOptions, SizeOptions, numbers
from foveate.cli.staging import Staging, slug, unique_names
from foveate.core.errors import FoveateError
from foveate.engine.report import Report
from foveate.families.loading import Origin, find_spec
from foveate.pipeline.call import Options, draws_classes
from foveate.pipeline.output import Images, PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import save_png
from foveate.policies.registry import load_policy

_ALL_SCALES = 1000
"""More previews than any schedule has scales."""
_NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Names of the files of one picture."""

    picture: str
    previews: tuple[str, ...]
    map_: str | None


def refuse_numbers(prompts: Sequence[str], model: ModelOptions) -> None:
    """Refuses what was meant as a value of a flag; a class-conditional model takes numbers.

    Raises:
        FoveateError: A prompt for a model of texts is a number, or there is no such model.
    """
    number = next((prompt for prompt in prompts if _NUMBER.fullmatch(prompt.strip())), None)
    if number is None:
        return
    origin = Origin(
        name_or_path=model.model,
        autoencoder=model.autoencoder,
        text_encoder=model.text_encoder,
        revision=model.revision,
        local_files_only=model.local_files_only,
    )
    if not draws_classes(find_spec(origin)):
        raise FoveateError(
            f"the prompt {number!r} is a number; several values of a flag have commas, as in --seed 7,8, and a number "
            "to draw goes into a file for --prompts"
        )


def draw(
    prompts: Sequence[str],
    model: ModelOptions,
    size: SizeOptions,
    sampling: SamplingOptions,
    options: GenerateOptions,
) -> int:
    """Draws and writes everything, or nothing.

    Raises:
        FoveateError: A flag is out of range, or a file cannot be read or written.
    """
    call = _options_of_call(size, sampling, options)
    folder = options.output.parent if options.is_one_file else options.output
    with Staging(folder) as staging:
        if model.device is None and not options.quiet and torch.cuda.is_available():
            note("a GPU is here; --device cuda uses it")
        pipe = open_pipeline(model, is_quiet=options.quiet)
        output, steps = _run(pipe, prompts, call, options.preview)
        stems = _stems(output, options)
        written = [_write(staging, output, row, stem, steps, options) for row, stem in enumerate(stems)]
        if options.trace:
            staging.path(_trace_name(stems)).write_text(output.trace.dumps(), encoding="utf-8")
        staging.publish()
    _report(output, written, folder, folder / _trace_name(stems) if options.trace else None, options.as_json)
    return 0


def _options_of_call(size: SizeOptions, sampling: SamplingOptions, options: GenerateOptions) -> Options:
    """Flags in the words of the pipeline; policies are read here, before any model is loaded."""
    return {
        **call_options(size, sampling),
        "policy": load_policy(options.policy),
        "seed": numbers("--seed", options.seed, int),
        "rng": options.rng,
        "num_images_per_prompt": options.num_images,
        "batch_invariant": options.batch_invariant,
        "trace": options.trace,
    }


def _run(
    pipe: Pipeline, prompts: Sequence[str], call: Options, has_previews: bool
) -> tuple[PipelineOutput, list[list[Image.Image]]]:
    """Draws; also returns the pictures after every scale but the last, if they were asked for."""
    steps: list[list[Image.Image]] = []
    for event in pipe.stream(list(prompts), previews=_ALL_SCALES if has_previews else 0, **call):
        if event.output is not None:
            return event.output, steps
        if event.images is not None:
            steps.append(_pictures(event.images))
    raise AssertionError("the last event of a stream carries the output")


def _pictures(images: Images) -> list[Image.Image]:
    """The same, known to be pictures."""
    assert isinstance(images, list), "this command asks for PIL images"
    return images


def _stems(output: PipelineOutput, options: GenerateOptions) -> list[str]:
    if options.is_one_file:
        return [options.output.stem]
    return unique_names([f"{slug(p)}-{seed}" for p, seed in zip(output.prompts, output.seeds, strict=True)])


def _trace_name(stems: Sequence[str]) -> str:
    """One trace holds the whole batch; it is named after the first picture."""
    return f"{stems[0]}-trace.json"


def _write(
    staging: Staging,
    output: PipelineOutput,
    row: int,
    stem: str,
    steps: Sequence[Sequence[Image.Image]],
    options: GenerateOptions,
) -> Written:
    """Writes the files of one picture."""
    picture = _pictures(output.images)[row]
    name = options.output.name if options.is_one_file else f"{stem}.png"
    save_png(picture, staging.path(name), output.row_config(row))
    previews = tuple(f"{stem}-scale-{scale:02}.png" for scale in range(len(steps)))
    for preview, pictures in zip(previews, steps, strict=True):
        pictures[row].save(staging.path(preview), format="PNG")
    if not options.trace:
        return Written(picture=name, previews=previews, map_=None)
    from foveate.viz.maps import compute_map  # noqa: PLC0415 - plots are loaded only where one is drawn

    map_name = f"{stem}-map.png"
    compute_map(picture, output.trace, row).save(staging.path(map_name), format="PNG")
    return Written(picture=name, previews=previews, map_=map_name)


def _report(
    output: PipelineOutput, written: Sequence[Written], folder: Path, trace: Path | None, as_json: bool
) -> None:
    if as_json:
        print_json(_as_json(output, written, folder, trace))
        return
    print_facts(_facts(output.report, output.config))
    for files in written:
        names = (files.picture, *files.previews, *([files.map_] if files.map_ is not None else []))
        print_paths(folder / name for name in names)
    print_paths([trace] if trace is not None else [])


def _as_json(output: PipelineOutput, written: Sequence[Written], folder: Path, trace: Path | None) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    for files, seed, prompt in zip(written, output.seeds, output.prompts, strict=True):
        image: dict[str, Any] = {"path": str(folder / files.picture), "seed": seed, "prompt": prompt}
        if files.previews:
            image["previews"] = [str(folder / name) for name in files.previews]
        if files.map_ is not None:
            image["map"] = str(folder / files.map_)
        images.append(image)
    found = {"images": images, **report_json(output)}
    return found if trace is None else {**found, "trace": str(trace)}


def report_json(output: PipelineOutput) -> dict[str, Any]:
    """Policy, time, FLOPs and tokens of a call, as `generate --json` says them."""
    report, policy = output.report, output.config["policy"]
    return {
        "policy": {key: policy[key] for key in ("spec", "fingerprint")},
        "ms": {part: getattr(report.ms, part) for part in ("text", "transformer", "decoder", "total")},
        "flops": {"run": report.flops_run, "full": report.flops_full},
        "tokens": {"run": report.tokens_run, "full": report.tokens_full},
    }


def _facts(report: Report, config: dict[str, Any]) -> list[tuple[str, str]]:
    """The short table for people."""
    ms, policy = report.ms, config["policy"]
    saved = 1 - report.tokens_run / report.tokens_full
    return [
        ("pictures", f"{len(config['seeds'])} of {config['width']}x{config['height']}, model {config['model']}"),
        ("policy", f"{policy['spec']} ({policy['fingerprint']})"),
        ("time", f"{ms.total:.0f} ms: text {ms.text:.0f}, transformer {ms.transformer:.0f}, decoder {ms.decoder:.0f}"),
        ("FLOPs", f"{in_units(report.flops_run)} of {in_units(report.flops_full)} ({report.flops_ratio:.1%})"),
        ("tokens", f"{report.tokens_run} of {report.tokens_full} ({saved:.1%} saved)"),
        ("predicted speedup", f"{report.predicted_speedup:.2f}x of the transformer"),
        *(("note", note) for note in report.notes),
    ]
