"""Speedup and fidelity of every method on the bundled model: tables and plot of the README and the policy pages.

    python benchmarks/frontier.py                   # measures, prints, and writes into out/frontier
    python benchmarks/frontier.py --update-pages    # writes into docs/results, and fills the tables of README and docs

Fidelity: all prompts, keyed randomness, one seed, against the full run in the same batches. Time: batch 1, the full run
and the setting in turns. A ratio is formed per prompt, and rows are compared by these ratios, never by milliseconds.
`full` is timed in the same way against itself, which shows the noise. Text match: how often the drawing's own label is
the nearest of all labels. The controls stand in the same table, and so does the yardstick: the full run, another seed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT, fill_pages

from foveate.bench.machine import describe_machine
from foveate.bench.spread import Spread
from foveate.conditioning.minilm import TextEncoder
from foveate.eval.pairs import fidelity_report
from foveate.families.loading import Origin, find_folder
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.registry import load_policy
from foveate.weights.folder import text_encoder_folder

HERE = Path(__file__).parent
BATCH = 8
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
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One setting; a speed-up is full over setting, one ratio per timed prompt."""

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
    "ld-pruning",
    "ld-pruning:sats=false,lhep_scales=1",
    "depthvar",
    "depthvar:reference_scale=-2",
    "skip-scales",
    "drop-branch:count=1",
    "drop-branch",
    "random-tokens:num_scales=1",
    "uniform-depth:num_scales=1",
    "late-bfloat16",
)
"""Settings of the README's table."""


def draw(pipe: Pipeline, prompts: Sequence[str], spec: str, seed: int) -> tuple[np.ndarray, float]:
    """All prompts in batches; uint8 images and run / full FLOPs."""
    images, run, full = [], 0, 0
    for i in range(0, len(prompts), BATCH):
        out = pipe(prompts[i : i + BATCH], seed=seed, policy=load_policy(spec), output_type="np")
        images.append(stack_uint8(out.images))
        run, full = run + out.report.flops_run, full + out.report.flops_full
    return np.concatenate(images), run / full


def clock(pipe: Pipeline, prompts: Sequence[str], spec: str) -> tuple[Spread, Spread]:
    """Speed-up of the transformer and of the whole call at batch 1: each prompt in full and with the setting.

    Every second prompt goes the other way round, as the later of two runs of a prompt tends to be the faster one.
    """
    transformer, total = [], []
    for i, prompt in enumerate(prompts):
        order = ("full", spec) if i % 2 == 0 else (spec, "full")
        both = [pipe(prompt, seed=0, policy=load_policy(policy)).report.ms for policy in order]
        full, own = both if i % 2 == 0 else reversed(both)
        transformer.append(full.transformer / own.transformer)
        total.append(full.total / own.total)
    return Spread.of(transformer), Spread.of(total)


class Matcher:
    """Text match: is an image's own label the nearest of all labels?"""

    def __init__(self, model: str, labels: Sequence[str]) -> None:
        # A script finds only its own folder; the recipe that trained the heads stands beside it.
        sys.path.append(str(ROOT))
        from recipes.emoji.heads import TextMatch  # noqa: PLC0415 - needs the eval extra

        self.heads = TextMatch.bundled()
        self.labels = list(labels)
        folder = text_encoder_folder(find_folder(Origin(name_or_path=model)))
        self.texts = TextEncoder.from_folder(folder).pooled(self.labels).numpy()

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """Share of images whose label comes first."""
        from recipes.emoji.features import features  # noqa: PLC0415

        similarity = self.heads.similarity(features(images), self.texts)
        wanted = np.array([self.labels.index(prompt) for prompt in prompts])
        return float((similarity.argmax(1) == wanted).mean())


def plot(results: Sequence[Result], yardstick: float, path: Path) -> None:
    """Fidelity against speed-up, one line per family."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(7.5, 4.6), dpi=120)
    for family in SETTINGS:
        points = sorted((r.transformer_speedup.median, r.psnr["mean"]) for r in results if r.family == family)
        if family == "full" or not points:
            continue
        control = family in BASELINES
        axis.plot(*zip(*points, strict=True), "o--" if control else "s-", label=family, alpha=0.9, lw=1.2, ms=5)
    axis.axhline(yardstick, color="grey", lw=1, ls=":")
    axis.annotate("another seed", (axis.get_xlim()[1], yardstick), ha="right", va="bottom", color="grey", fontsize=9)
    axis.set_xlabel("measured speed-up of the transformer, batch 1")
    axis.set_ylabel("PSNR to the full run, dB")
    axis.legend(fontsize=8, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def measure(
    pipe: Pipeline,
    prompts: Sequence[str],
    timed: Sequence[str],
    matcher: Matcher | None,
    families: Sequence[str] = tuple(SETTINGS),
) -> list[Result]:
    """Every setting of some families, one after the other."""
    results: list[Result] = []
    reference, _ = draw(pipe, prompts, "full", 0)
    for family in families:
        for spec in SETTINGS[family]:
            images, ratio = (reference, 1.0) if spec == "full" else draw(pipe, prompts, spec, 0)
            report = fidelity_report(images, reference).to_json()
            speedup, end_to_end = clock(pipe, timed, spec)
            results.append(
                Result(
                    family=family,
                    spec=spec,
                    psnr=report["psnr"],
                    ssim=report["ssim"],
                    foreground_psnr=report["foreground_psnr"],
                    identical=report["identical"],
                    flops_ratio=ratio,
                    transformer_speedup=speedup,
                    end_to_end_speedup=end_to_end,
                    text_match=matcher.score(images, prompts) if matcher else None,
                )
            )
            print(results[-1].row(), flush=True)
    return results


def tables(results: Sequence[Result], yardstick: dict[str, Any]) -> dict[str, str]:
    """The table of every page by its name, with its own rows; those that hold baselines end with another seed.

    These are `all`, and with all families `readme`, else `baselines`.
    """
    seed_row = (
        f"| *another seed* | - | - | 100 % | {yardstick['psnr']['mean']:.1f} | {yardstick['psnr']['p10']:.1f} | "
        f"{yardstick['foreground_psnr']['mean']:.1f} | {yardstick['ssim']['mean']:.3f} | - |"
    )
    families = {result.family for result in results}
    found = {
        name: [r.row() for r in results if r.family == name]
        for name in SETTINGS
        if name in families and name not in BASELINES
    }
    found["all"] = [*(r.row() for r in results), seed_row]
    if families == set(SETTINGS):
        found["readme"] = [*(r.row() for r in results if r.spec in HEADLINE), seed_row]
    else:
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
- fidelity: {data["prompts"]} prompts, seed 0, batches of {BATCH}, against the full run with the same random numbers;
  PSNR is a mean, beside its tenth percentile; equal images get 100 dB; foreground PSNR leaves out
  pixels that are white in both
- time: batch 1, the first {data["timed"]} prompts, each generated in full and with the setting, in changing order;
  median and p10-p90 of full over setting. The row of `full` is `full` against itself: the noise of the timing
- FLOPs: of the transformer, counted while it ran, as a share of the full run
- text match: how often the label that was asked for is the nearest of all {data["labels"]} labels to the image

{table}

![PSNR to the full run against measured speedup](frontier.png)
"""


def main() -> None:
    """Measures, writes JSON, the page and the plot, and fills other pages if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, help="folder for frontier.json, .md and .png")
    parser.add_argument("--update-pages", action="store_true", help="also fill the tables of the README and docs")
    parser.add_argument("--timed", type=int, default=12, help="prompts that are timed at batch 1")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), metavar="FAMILY", help="the pages of these alone")
    parser.add_argument("--prompts", type=int, help="take so many of the prompts; the tables say so")
    parser.add_argument("--labels", type=Path, default=HERE / "labels.txt")
    given = parser.parse_args()
    is_whole = given.update_pages and not given.only
    out: Path = given.out or ROOT / ("docs/results" if is_whole else "out/frontier")
    families = [name for name in SETTINGS if not given.only or name in (*CONTROLS, *given.only)]
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()[: given.prompts]
    pipe = Pipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    labels = given.labels.read_text(encoding="utf-8").splitlines()
    pipe(prompts[:2], seed=0)
    timed = prompts[: given.timed]
    results = measure(pipe, prompts, timed, Matcher(given.model, labels), families)
    reference, other = draw(pipe, prompts, "full", 0)[0], draw(pipe, prompts, "full", 1000)[0]
    yardstick = fidelity_report(other, reference).to_json()
    schedule = pipe.model.spec.default_schedule
    data = {
        "command": shlex.join(["python", "benchmarks/frontier.py", *sys.argv[1:]]),
        "model": given.model,
        "size": f"{reference.shape[2]}x{reference.shape[1]}",
        "tokens": schedule.num_tokens,
        "prompts": len(prompts),
        "timed": len(timed),
        "labels": len(labels),
        "machine": describe_machine(),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "yardstick": yardstick,
        "results": [asdict(result) for result in results],
    }
    found = tables(results, yardstick)
    if given.prompts:
        found = {name: f"{table}\n\n*{len(prompts)} prompts, {len(timed)} timed.*" for name, table in found.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / "frontier.md").write_text(page(data, found["all"]), encoding="utf-8")
    plot(results, yardstick["psnr"]["mean"], out / "frontier.png")
    if given.update_pages:
        fill_pages(found)


if __name__ == "__main__":
    main()
