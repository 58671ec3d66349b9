"""`foveate bench`: time, throughput and memory of policies beside each other, and a profile of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from foveate.cli.options import (
    MEASUREMENT,
    OUTPUT,
    PICTURE,
    POLICY,
    ConfigFlag,
    JsonFlag,
    ModelOptions,
    QuietFlag,
    SizeOptions,
    numbers,
)
from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.core.schedule import parse_ratio

_BATCHES = {"throughput": [1, 4, 16]}
"""Where not only batch 1 is measured by default."""


@Parameter(name="*", group=PICTURE)
@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What is measured, how often, and what is reported.

    Attributes:
        size: 0.06M, 0.25M, 0.60M or 1M pixels, or WxH such as 256x256; may be repeated. Default: the model's own.
        aspect_ratio: Width to height, such as 4:3, for a size that is not WxH; may be repeated.
        batch: Pictures drawn at once; several with commas. Default: 1, and 1,4,16 for throughput.
        prompts: A file with one prompt a line, which take turns; without it one built-in prompt.
        seed: First seed; every picture of a policy has its own.
        policy: A name, a spec such as skip-scales:count=2, or a YAML file; may be repeated.
            Ratios are against the first one. Default: full alone.
        runs: Rounds that count; every policy runs once in each.
        warmup: Rounds before them that do not count, at every size and batch.
        output: Folder for bench.json, bench.csv, bench.svg and bench.md; for calibrate, profile.json.
        as_json: Print one JSON object.
        quiet: Show no progress.
        config: A YAML file with values for these flags; flags win.
    """

    size: list[str] | None = None
    aspect_ratio: list[str] | None = None
    batch: list[str] | None = None
    prompts: Path | None = None
    seed: int = 0
    policy: Annotated[list[str] | None, Parameter(name=["--policy", "-p"], group=POLICY)] = None
    runs: Annotated[int, Parameter(group=MEASUREMENT)] = 10
    warmup: Annotated[int, Parameter(group=MEASUREMENT)] = 1
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], group=OUTPUT)] = None
    as_json: JsonFlag = False
    quiet: QuietFlag = False
    config: ConfigFlag = None


_MODEL, _OPTIONS = ModelOptions(), BenchOptions()


def bench(
    kind: Annotated[Literal["latency", "throughput", "memory", "calibrate"], Parameter(group=MEASUREMENT)],
    /,
    *,
    options: BenchOptions = _OPTIONS,
    model: ModelOptions = _MODEL,
) -> int:
    """Measure time, throughput or memory of policies, or write a profile of this machine.

    Args:
        kind: latency: time by part and scale. throughput: pictures per second by batch, and percentiles at batch 1.
            memory: weights, keys and values, and the rest. calibrate: what a token costs here, as data.
        options: What is measured, how often, and what is reported.
        model: Which model runs, and on what.
    """
    for flag, least in (("runs", 1), ("warmup", 0), ("seed", 0)):
        if getattr(options, flag) < least:
            raise FoveateError(f"--{flag} must be {least} or more, got {getattr(options, flag)}")
    if kind == "calibrate" and options.policy is not None:
        raise FoveateError("calibrate measures the full policy alone; leave out --policy")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise FoveateError(f"--output must be a folder, {options.output} is a file")
    pictures = sizes_of(options.size, options.aspect_ratio)
    batches = _batches(kind, options.batch)
    prompts = None if options.prompts is None else read_prompt_file(options.prompts)
    from foveate.cli import benching  # noqa: PLC0415 - torch is loaded when the command runs

    return benching.run(kind, pictures, batches, prompts, model, options)


def sizes_of(sizes: Sequence[str] | None, ratios: Sequence[str] | None) -> list[SizeOptions]:
    """Every size with every aspect ratio; a size as WxH stands by itself.

    Raises:
        FoveateError: Neither a budget of pixels nor WxH, an unknown ratio, or a ratio with nothing to apply to.
    """
    for ratio in ratios or []:
        parse_ratio(ratio)
    texts: Sequence[str | None] = sizes or [None]
    shapes: Sequence[str | None] = ratios or [None]
    found = [SizeOptions(size=size, aspect_ratio=ratio) for size in texts for ratio in shapes]
    for picture in found:
        picture.width_and_height()
    return found


def _batches(kind: str, texts: list[str] | None) -> list[int]:
    """The batches, each once, in the order given."""
    given = numbers("--batch", texts, int)
    if given is None:
        return _BATCHES.get(kind, [1])
    batches = given if isinstance(given, list) else [given]
    for batch in batches:
        if batch < 1:
            raise FoveateError(f"--batch must be 1 or more, got {batch}")
    return list(dict.fromkeys(batches))
