"""A policy against another one, mostly the full run: how much faster, how alike, how many FLOPs; from one process.

Both run alternating (A B A B ...) after a warm-up, so that a machine that slows down slows both. Times are medians over
the runs; images have the same keyed randomness. The yardstick is the PSNR between two seeds of the full run: a
method below it changes as much as a new seed does.
"""

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from foveate.core.atomic import write_text
from foveate.core.errors import FoveateError, unknown
from foveate.core.policy import Policy
from foveate.core.prompt_file import read_prompt_file
from foveate.engine.report import Report
from foveate.eval.compare_page import Pair, render
from foveate.eval.fidelity import missing_extra, psnr, ssim
from foveate.eval.pairs import FidelityReport, fidelity_report
from foveate.pipeline.options import Options
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.registry import load_policy

_CHECK = re.compile(r"\s*([a-z_]+(?:\.[a-z0-9_]+)?)\s*(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?)\s*")
_OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}

STATISTICS = ("mean", "p10", "min")
FIGURES = (
    "n", *(f"{name}.{part}" for name in ("psnr", "ssim", "foreground_psnr") for part in STATISTICS), "identical",
    "yardstick_psnr", *(f"speedup.{part}" for part in ("transformer", "decoder", "end_to_end")), "flops_ratio", "runs",
)  # fmt: skip
"""Every number that a bound can be about, by its dotted name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureBound:
    """A condition on one figure, such as `ssim.p10 >= 0.88`."""

    figure: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "FigureBound":
        """Reads a bound.

        Raises:
            FoveateError: It is not written as figure, comparison, number, or there is no such figure.
        """
        match = _CHECK.fullmatch(text)
        if match is None:
            raise FoveateError(f'a bound is written like "ssim.p10 >= 0.88", got {text!r}')
        if match[1] not in FIGURES:
            raise unknown("figure", match[1], FIGURES)
        return cls(figure=match[1], comparison=match[2], limit=float(match[3]))

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether it is true of these figures."""
        return bool(_OPERATORS[self.comparison](figures[self.figure], self.limit))


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times faster the policy is than what it is compared with: median over median."""

    transformer: float
    decoder: float
    end_to_end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One image of the comparison."""

    prompt: str
    seed: int
    psnr: float
    ssim: float
    is_identical: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparisonReport:
    """What a comparison found; `pictures` and `references` are uint8 (n, height, width, 3)."""

    policy: str
    against: str
    fidelity: FidelityReport
    yardstick_psnr: float
    speedup: Speedup
    flops_ratio: float
    runs: int
    rows: tuple[ImageRow, ...]
    config: dict[str, Any]
    pictures: np.ndarray
    references: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Plain data in the keys that every JSON output of this library uses."""
        return {
            **self.fidelity.to_json(),
            "yardstick_psnr": self.yardstick_psnr,
            "speedup": asdict(self.speedup),
            "flops_ratio": self.flops_ratio,
            "policy": self.policy,
            "against": self.against,
            "runs": self.runs,
            "images": [asdict(row) for row in self.rows],
            "config": self.config,
        }

    def check(self, bound: str) -> bool:
        """Whether a bound such as `ssim.p10 >= 0.88` holds.

        Raises:
            FoveateError: The bound is not written as figure, comparison, number, or there is no such figure.
        """
        return FigureBound.parse(bound).holds(self.figures())

    def figures(self) -> dict[str, float]:
        """The values of `FIGURES`."""
        found: dict[str, float] = {}
        for name, value in self.to_json().items():
            if isinstance(value, dict) and name != "config":
                found |= {f"{name}.{part}": float(number) for part, number in value.items()}
            elif isinstance(value, int | float):
                found[name] = float(value)
        return found

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page; returns its path."""
        pairs = [
            Pair(
                title=f"{row.prompt} (seed {row.seed})",
                note="identical" if row.is_identical else f"PSNR {row.psnr:.1f} dB, SSIM {row.ssim:.3f}",
                reference=reference,
                picture=picture,
            )
            for row, reference, picture in zip(self.rows, self.references, self.pictures, strict=True)
        ]
        figures = {name: _printed(value) for name, value in self.figures().items()}
        page = render(self.policy, self.against, figures, pairs, json.dumps(self.config, indent=1))
        write_text(path, page)
        return Path(path)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Side:
    """One policy's pass over all prompts."""

    pictures: np.ndarray
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    reports: tuple[Report, ...]
    config: dict[str, Any]

    def ms(self, part: str) -> float:
        return float(sum(getattr(report.ms, part) for report in self.reports))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Work:
    """What both sides generate: the batches of prompts, images per prompt, the first seed, and the other options."""

    chunks: list[list[str]]
    seeds: int
    first_seed: int
    options: Options


_SET_HERE = ("policy", "seed", "generator", "num_images_per_prompt", "output_type")


def compare(  # noqa: PLR0913 - what is generated, how it is judged, and how it is timed
    pipe: Pipeline,
    policy: str | Path | Policy,
    prompts: str | Path | Sequence[str],
    seeds: int = 1,
    against: str | Path | Policy = "full",
    *,
    runs: int = 3,
    first_seed: int = 0,
    batch_size: int = 8,
    options: Options | None = None,
) -> ComparisonReport:
    """Compares two policies on the same prompts and seeds.

    Args:
        pipe: The model.
        policy: What is judged.
        prompts: Texts, or a file with one prompt a line.
        seeds: Images per prompt, from `first_seed` on.
        against: What it is judged by.
        runs: How often each side is timed, at least once.
        first_seed: Of every prompt.
        batch_size: Images generated as one batch at most (never less than one prompt's images).
        options: Other options of every call, such as width and height or guidance_scale; a negative prompt is one text.

    Raises:
        FoveateError: No prompts, an option that the comparison sets itself, fewer than one run or seed, torchmetrics is
            missing, or what the pipeline refuses.
    """
    for name, value in (("seeds", seeds), ("runs", runs), ("batch_size", batch_size)):
        if value < 1:
            raise FoveateError(f"{name} must be 1 or more, got {value}")
    taken = [name for name in _SET_HERE if name in (options or {})]
    if taken:
        raise FoveateError(f"a comparison sets {', '.join(taken)} itself; leave it out of options")
    refuse_without_extra()
    texts = read_prompts(prompts)
    sides = (load_policy(policy), load_policy(against))
    per_batch = max(batch_size // seeds, 1)
    chunks = [texts[i : i + per_batch] for i in range(0, len(texts), per_batch)]
    work = _Work(chunks=chunks, seeds=seeds, first_seed=first_seed, options=options or {})
    for side in sides:
        _side(pipe, side, replace(work, chunks=chunks[:1]))
    timed: tuple[list[_Side], list[_Side]] = ([], [])
    for _ in range(runs):
        for side, passes in zip(sides, timed, strict=True):
            passes.append(_side(pipe, side, work))
    yardstick = _yardstick(pipe, work, timed[1][0] if sides[1].spec == "full" else None)
    return _report(sides, timed, yardstick)


def refuse_without_extra() -> None:
    """Refuses what is missing before anything is loaded or generated.

    Raises:
        FoveateError: torchmetrics is not installed.
    """
    if find_spec("torchmetrics") is None:
        raise FoveateError(missing_extra("a comparison"))


def read_prompts(prompts: str | Path | Sequence[str]) -> list[str]:
    """Texts as given, or the lines of a file that are not empty.

    Raises:
        FoveateError: The file cannot be read, or there is no prompt.
    """
    texts = read_prompt_file(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    if not texts:
        raise FoveateError("a comparison needs at least one prompt, got none")
    return texts


def _side(pipe: Pipeline, policy: Policy, work: _Work) -> _Side:
    call: Options = {
        **work.options,
        "num_images_per_prompt": work.seeds,
        "seed": work.first_seed,
        "policy": policy,
        "output_type": "np",
    }
    outputs: list[PipelineOutput] = [pipe(texts, **call) for texts in work.chunks]
    return _Side(
        pictures=np.concatenate([stack_uint8(output.images) for output in outputs]),
        seeds=tuple(seed for output in outputs for seed in output.seeds),
        prompts=tuple(prompt for output in outputs for prompt in output.prompts),
        reports=tuple(output.report for output in outputs),
        config=outputs[0].config,
    )


def _yardstick(pipe: Pipeline, work: _Work, full: _Side | None) -> float:
    """Mean PSNR between two seeds of the full run of a prompt; uses images that exist where it can."""
    policy = load_policy("full")
    first = full or _side(pipe, policy, work)
    if work.seeds > 1:
        return float(psnr(first.pictures[0 :: work.seeds], first.pictures[1 :: work.seeds]).mean())
    other = _side(pipe, policy, replace(work, first_seed=work.first_seed + 1))
    return float(psnr(first.pictures, other.pictures).mean())


def _report(sides: tuple[Policy, Policy], timed: tuple[list[_Side], list[_Side]], yardstick: float) -> ComparisonReport:
    ours, reference = timed[0][0], timed[1][0]
    parts = ("transformer", "decoder", "total")
    ours_ms, reference_ms = ({part: median(p.ms(part) for p in passes) for part in parts} for passes in timed)
    speedup = {part: reference_ms[part] / max(ours_ms[part], 1e-9) for part in parts}
    values = zip(
        ours.prompts,
        ours.seeds,
        psnr(ours.pictures, reference.pictures).tolist(),
        ssim(ours.pictures, reference.pictures).tolist(),
        (ours.pictures == reference.pictures).all(axis=(1, 2, 3)).tolist(),
        strict=True,
    )
    return ComparisonReport(
        policy=sides[0].spec,
        against=sides[1].spec,
        fidelity=fidelity_report(ours.pictures, reference.pictures),
        yardstick_psnr=yardstick,
        speedup=Speedup(transformer=speedup["transformer"], decoder=speedup["decoder"], end_to_end=speedup["total"]),
        flops_ratio=sum(r.flops_run for r in ours.reports) / sum(r.flops_full for r in ours.reports),
        runs=len(timed[0]),
        rows=tuple(ImageRow(prompt=t, seed=s, psnr=p, ssim=m, is_identical=i) for t, s, p, m, i in values),
        config={key: value for key, value in ours.config.items() if key not in ("prompts", "seeds", "policy")},
        pictures=ours.pictures,
        references=reference.pictures,
    )


def _printed(value: float) -> str:
    return f"{value:.4g}"
