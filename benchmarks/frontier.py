"""Speedup and fidelity of every method on the bundled models: tables and plots of the README and the policy pages.

    python benchmarks/frontier.py                   # measures, prints, and writes into out/frontier
    python benchmarks/frontier.py --update-pages    # writes into docs/results, and fills the tables of README and docs
    python benchmarks/frontier.py --study eight --update-pages      # the same on emoji-eight, with 2,521 tokens

One comparison (`foveate.eval.compare`): all settings in turns, one prompt a call with all its seeds, keyed randomness,
against the full run. A ratio is formed within a turn. `full` is measured against itself, too, which shows the noise.
Text match: how often the drawing's own label is the nearest of all labels. The controls stand in the same table, and so
does the yardstick: the full run, another seed. Measurements are kept in out/frontier/store, where the same command goes
on after an interruption.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT, fill_pages

from foveate.bench.machine import describe_machine
from foveate.conditioning.minilm import TextEncoder
from foveate.eval.compare import compare_policies
from foveate.eval.measure import Setup
from foveate.eval.report import ComparisonReport, PolicyResult
from foveate.eval.statistics import Spread
from foveate.eval.sweep import draw_frontier
from foveate.families.loading import Origin, find_folder
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from foveate.weights.folder import text_encoder_folder

HERE = Path(__file__).parent
SETTINGS: dict[str, tuple[str, ...]] = {
    "full": ("full",),
    "skip-scales": ("skip-scales", "skip-scales:count=2"),
    "drop-branch": ("drop-branch:count=1", "drop-branch", "drop-branch:count=4"),
    "ld-pruning": (
        "ld-pruning",
        "ld-pruning:energy_share=0.9",
        "ld-pruning:sats=false,lhep_scales=1",
        "ld-pruning:sats=false,lhep_scales=1,energy_share=0.9",
        "ld-pruning-draft",
    ),
    "depthvar": (
        "depthvar",
        "depthvar:reference_scale=-3",
        "depthvar:reference_scale=-2",
        "depthvar:reference_scale=-2,fill=identity",
    ),
    "random-tokens": ("random-tokens", "random-tokens:num_scales=1"),
    "uniform-depth": ("uniform-depth:num_scales=1",),
    "blocks-per-scale": ("blocks-per-scale:keep_ratios=[0.75,0.5]",),
    "fastvar": ("fastvar", "fastvar:skip_last=0,reference_scale=-3"),
    "sparsevar": ("sparsevar:num_scales=1",),
    "skipvar": ("skipvar",),
    "attention-entropy": ("attention-entropy:num_scales=1,polarity=low", "attention-entropy:num_scales=1"),
    "feature-magnitude": ("feature-magnitude:num_scales=1",),
    "token-variance": ("token-variance:num_scales=1",),
    "cached-guidance": ("cached-guidance", "cached-guidance:keep_ratio=0.25"),
    "kv-eviction": ("kv-eviction:keep_first=2,window=1",),
    "late-bfloat16": ("late-bfloat16:count=1", "late-bfloat16"),
    "compose": ("drop-branch:count=1|depthvar:reference_scale=-2",),
    "fovea": ("fovea:shares=[0.5],guided_shares=[]", "fovea:shares=[0.5],guided_shares=[0.5]"),
}

_HALF, _QUARTER = "shares=[0.5],guided_shares=[0.5]", "shares=[0.5,0.25],guided_shares=[0.5,0.5]"
EIGHT: dict[str, tuple[str, ...]] = {
    "full": ("full",),
    "skip-scales": ("skip-scales", "skip-scales:count=2"),
    "drop-branch": ("drop-branch:count=1", "drop-branch", "drop-branch:count=4"),
    "random-tokens": ("random-tokens:num_scales=1,fill=zero", "random-tokens:num_scales=2,fill=zero"),
    "uniform-depth": ("uniform-depth:num_scales=1",),
    "blocks-per-scale": ("blocks-per-scale:keep_ratios=[0.75,0.5]",),
    "fovea": (
        "fovea:shares=[],guided_shares=[0.5]",
        "fovea:shares=[0.5],guided_shares=[]",
        f"fovea:{_HALF}",
        f"fovea:{_HALF},likeness=1000,guidance_likeness=1000",
        "fovea:shares=[0.75,0.5],guided_shares=[0.67,0.5]",
        f"fovea:{_QUARTER}",
        "fovea:shares=[0.5,0.5,0.25],guided_shares=[0.5,0.5,0.5]",
        f"fovea:{_HALF}|depthvar:reference_scale=-2",
    ),
    "ld-pruning": ("ld-pruning", "ld-pruning:fill=zero", "ld-pruning:sats=false,lhep_scales=1,fill=zero"),
    "depthvar": ("depthvar", "depthvar:reference_scale=-2"),
    "fastvar": ("fastvar",),
    "sparsevar": ("sparsevar:num_scales=1",),
    "skipvar": ("skipvar",),
    "attention-entropy": ("attention-entropy:num_scales=1,fill=zero",),
    "feature-magnitude": ("feature-magnitude:num_scales=1,fill=zero",),
    "token-variance": ("token-variance:num_scales=1,fill=zero",),
    "cached-guidance": ("cached-guidance", "cached-guidance:keep_ratio=0.25"),
}
"""What runs on emoji-eight; `late-bfloat16` is left out, as it needs a processor with bfloat16 instructions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One setting; a speed-up is full over setting, one ratio per prompt."""

    family: str
    spec: str
    psnr: dict[str, float]
    ssim: dict[str, float]
    foreground_psnr: dict[str, float]
    identical: int
    flops_ratio: float
    transformer_speedup: Spread
    end_to_end_speedup: Spread
    text_match: float | None

    @classmethod
    def of(cls, family: str, spec: str, found: PolicyResult) -> "Result":
        """The row of a setting, under the name that it has here."""
        fidelity, speedups = found.fidelity.to_json(), found.timing.speedups
        return cls(
            family=family,
            spec=spec,
            psnr=fidelity["psnr"],
            ssim=fidelity["ssim"],
            foreground_psnr=fidelity["foreground_psnr"],
            identical=fidelity["identical"],
            flops_ratio=found.flops_ratio,
            transformer_speedup=speedups["transformer"],
            end_to_end_speedup=speedups["end_to_end"],
            text_match=fidelity[Matcher.name]["mean"] if Matcher.name in fidelity else None,
        )

    def row(self) -> str:
        """A line of the Markdown table."""
        match = "-" if self.text_match is None else f"{100 * self.text_match:.0f} %"
        return (
            f"| `{self.spec.replace('|', chr(92) + '|')}` | {_times(self.transformer_speedup)} | "
            f"{_times(self.end_to_end_speedup)} | {100 * self.flops_ratio:.0f} % | "
            f"{self.psnr['mean']:.1f} | {self.psnr['p10']:.1f} | {self.foreground_psnr['mean']:.1f} | "
            f"{self.ssim['mean']:.3f} | {match} |"
        )


def _times(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x ({ratio.p10:.2f}-{ratio.p90:.2f})"


HEADER = (
    "| policy | speedup (p10-p90) | end to end (p10-p90) | FLOPs | PSNR dB | PSNR p10 | foreground PSNR | SSIM | "
    "text match |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
CONTROLS = ("full", "skip-scales", "drop-branch")
"""Families that every run measures, so that its other rows have baselines from the same run."""
BASELINES = (
    *CONTROLS,
    "random-tokens",
    "uniform-depth",
    "blocks-per-scale",
    "feature-magnitude",
    "token-variance",
    "late-bfloat16",
)
"""Families that share one page and have no table there: their rows stand beside each other."""

HEADLINE = (
    "full",
    "fovea:shares=[],guided_shares=[0.5]",
    f"fovea:{_HALF}",
    "fovea:shares=[0.75,0.5],guided_shares=[0.67,0.5]",
    f"fovea:{_QUARTER}",
    "drop-branch:count=1",
    "drop-branch",
    "skip-scales",
    "random-tokens:num_scales=1,fill=zero",
    "ld-pruning",
    "ld-pruning:fill=zero",
    "depthvar:reference_scale=-2",
)
"""Settings of the README's table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is measured on one model; `headline` is what the README shows, `files` the name of what is written."""

    model: str
    prompts: str
    seeds: int
    settings: dict[str, tuple[str, ...]]
    files: str
    headline: tuple[str, ...] = ()


STUDIES = {
    "tiny": Study(
        model="emoji",
        prompts="prompts.txt",
        seeds=1,
        settings=SETTINGS,
        files="frontier",
    ),
    "eight": Study(
        model="emoji-eight",
        prompts="eight.txt",
        seeds=4,
        settings=EIGHT,
        headline=HEADLINE,
        files="eight",
    ),
}


class Matcher:
    """A judge: 1 where an image's own label is the nearest of all labels, else 0."""

    name = "text_match"
    is_error = False

    def __init__(self, model: str, labels: Sequence[str]) -> None:
        # A script finds only its own folder; the recipe that trained the heads stands beside it.
        sys.path.append(str(ROOT))
        from recipes.emoji.heads import TextMatch  # noqa: PLC0415 - needs the eval extra

        self.heads = TextMatch.bundled()
        self.labels = list(labels)
        self.fingerprint = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:12]
        folder = text_encoder_folder(find_folder(Origin(name_or_path=model)))
        self.texts = TextEncoder.from_folder(folder).pooled(self.labels).numpy()

    def score(self, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Whether each label comes first."""
        from recipes.emoji.features import features  # noqa: PLC0415

        similarity = self.heads.similarity(features(images), self.texts)
        wanted = np.array([self.labels.index(prompt) for prompt in prompts])
        return np.asarray(similarity.argmax(1) == wanted, dtype=np.float64)


def results_of(report: ComparisonReport, study: Study, families: Sequence[str]) -> list[Result]:
    """A row for every setting of some families."""
    found = {result.policy: result for result in report.policies}
    settings = [(family, spec) for family in families for spec in study.settings[family]]
    return [Result.of(family, spec, found[load_policy(spec).spec]) for family, spec in settings]


def plot(report: ComparisonReport, study: Study, path: Path) -> None:
    """Fidelity against speedup, one line per method, baselines dashed."""
    baselines = {load_policy(spec).spec for family in BASELINES for spec in study.settings.get(family, ())}
    sides: tuple[list[PolicyResult], list[PolicyResult]] = ([], [])
    for result in report.policies:
        sides[result.policy in baselines].append(result)
    draw_frontier(replace(report, policies=tuple(sides[0]), controls=tuple(sides[1])), path, "png")


def tables(results: Sequence[Result], yardstick: dict[str, Any], study: Study) -> dict[str, str]:
    """The table of every page by its name, with its own rows; those that hold baselines end with another seed.

    These are `all`, the headline of the study, and `baselines` where not all families ran. Pages of policies have the
    first study's.
    """
    seed_row = (
        f"| *another seed* | - | - | 100 % | {yardstick['psnr']['mean']:.1f} | {yardstick['psnr']['p10']:.1f} | "
        f"{yardstick['foreground_psnr']['mean']:.1f} | {yardstick['ssim']['mean']:.3f} | - |"
    )
    families = {result.family for result in results}
    found = {
        name: [r.row() for r in results if r.family == name]
        for name in study.settings
        if name in families and name not in BASELINES and study.settings is SETTINGS
    }
    found["all"] = [*(r.row() for r in results), seed_row]
    if study.headline:
        rows = {result.spec: result.row() for result in results}
        found[study.files] = [*(rows[spec] for spec in study.headline if spec in rows), seed_row]
    elif families != set(study.settings):
        found["baselines"] = [*(r.row() for r in results if r.family in BASELINES), seed_row]
    return {name: "\n".join([HEADER, *rows]) for name, rows in found.items()}


def page(data: dict[str, Any], table: str) -> str:
    """`frontier.md`: what was measured, on what, by which command; and every setting."""
    machine = data["machine"]
    cpu, versions = machine["cpu"], machine["versions"]
    return f"""# Every setting on the {data["model"]} model

```text
{data["command"]}
```

- model: {data["model"]}, {data["size"]}, {data["tokens"]} tokens, {data["dtype"]}, CPU
- machine: {cpu["name"]}, {cpu["threads"]} threads; kernels: {cpu["kernels"]}
- versions: foveate {versions["foveate"]}, python {versions["python"]}, torch {versions["torch"]}
- fidelity: {data["prompts"]} prompts, {data["seeds"]} images each, against the full run with the same random numbers;
  PSNR is a mean, beside its tenth percentile; equal images get 100 dB; foreground PSNR leaves out
  pixels that are white in both
- time: one prompt a call, with all its seeds ({data["seeds"]}); every prompt {data["runs"]} times in full and with
  every setting, in turns in changing order;
  median and p10-p90 of full over setting. The row of `full` is `full` against itself: the noise of the timing
- FLOPs: of the transformer, counted while it ran, as a share of the full run
- text match: how often the label that was asked for is the nearest of all {data["labels"]} labels to the image

{table}

![PSNR to the full run against measured speedup]({data["plot"]})
"""


def measure(
    pipe: Pipeline, given: argparse.Namespace, study: Study, families: Sequence[str], labels: Sequence[str]
) -> ComparisonReport:
    """All settings of some families in one comparison, which goes on where it was interrupted.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same command goes on.
    """
    setup = Setup(
        prompts=tuple((HERE / study.prompts).read_text(encoding="utf-8").splitlines()[: given.prompts]),
        seeds=study.seeds,
        first_seed=0,
        against=load_policy("full"),
        runs=given.runs,
        batch_size=1,
        options={},
        judges=(Matcher(given.model or study.model, labels),),
    )
    policies = [load_policy(spec) for family in families for spec in study.settings[family]]
    report = compare_policies(pipe, policies, setup, given.store or ROOT / f"out/{study.files}/store")
    if report.is_interrupted:
        raise KeyboardInterrupt
    return report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="tiny", help="settings and prompts")
    parser.add_argument("--model", help="in place of the study's own")
    parser.add_argument("--out", type=Path, help="folder for the JSON, the page and the plot")
    parser.add_argument("--store", type=Path, help="folder of the measurements")
    parser.add_argument("--update-pages", action="store_true", help="also fill the tables of the README and docs")
    parser.add_argument("--runs", type=int, default=1, help="how often every prompt is timed")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="the pages of these alone")
    parser.add_argument("--prompts", type=int, help="take so many of the prompts; the tables say so")
    parser.add_argument("--labels", type=Path, default=HERE / "labels.txt")
    return parser.parse_args()


def main() -> None:
    """Measures, writes JSON, the page and the plot, and fills other pages if asked to."""
    given = arguments()
    study = STUDIES[given.study]
    is_whole = given.update_pages and not given.only
    out: Path = given.out or ROOT / ("docs/results" if is_whole else f"out/{study.files}")
    families = [name for name in study.settings if not given.only or name in (*CONTROLS, *given.only)]
    pipe = Pipeline.from_pretrained(given.model or study.model)
    pipe.set_progress_bar_config(disable=True)
    labels = given.labels.read_text(encoding="utf-8").splitlines()
    report = measure(pipe, given, study, families, labels)
    results, yardstick = results_of(report, study, families), report.yardstick.to_json()
    num_prompts, config = len(report.policies[0].rows) // study.seeds, report.config
    data = {
        "command": shlex.join(["python", "benchmarks/frontier.py", *sys.argv[1:]]),
        "model": given.model or study.model,
        "size": f"{config['width']}x{config['height']}",
        "tokens": pipe.model.spec.default_schedule.num_tokens,
        "prompts": num_prompts,
        "seeds": study.seeds,
        "plot": f"{study.files}.png",
        "runs": given.runs,
        "labels": len(labels),
        "machine": describe_machine(),
        "dtype": config["dtype"],
        "yardstick": yardstick,
        "results": [asdict(result) for result in results],
    }
    found = tables(results, yardstick, study)
    if given.prompts:
        found = {name: f"{table}\n\n*{num_prompts} prompts.*" for name, table in found.items()}
    print(found["all"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{study.files}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / f"{study.files}.md").write_text(page(data, found["all"]), encoding="utf-8")
    plot(report, study, out / f"{study.files}.png")
    if given.update_pages:
        fill_pages(found)


if __name__ == "__main__":
    main()
