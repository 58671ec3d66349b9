"""What every method costs and loses on the bundled model: the tables and the plot of the README and the policy pages.

    python benchmarks/frontier.py --out docs/results

Fidelity: all prompts, keyed randomness, one seed, against the full run in the same batches. Time: batch 1, the full run
and the setting alternating, medians. Text match: how often the drawing's own label is the nearest of all labels. The
trivial controls stand in the same table, and so does the yardstick, the full run with another seed.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pages import ROOT, fill_pages

from foveate.conditioning.minilm import TextEncoder
from foveate.eval.fidelity import fidelity_report
from foveate.families.loading import Origin, find_folder
from foveate.pipeline import Pipeline, stack_uint8
from foveate.policies.registry import load_policy

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
    "compose": ("drop-branch:count=1|depthvar:reference_scale=-2",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One setting."""

    family: str
    spec: str
    psnr: dict[str, float]
    ssim: dict[str, float]
    foreground_psnr: dict[str, float]
    identical: int
    flops_ratio: float
    transformer_ms: float
    total_ms: float
    transformer_speedup: float
    end_to_end_speedup: float
    text_match: float | None

    def row(self) -> str:
        """A line of the Markdown table."""
        match = "-" if self.text_match is None else f"{100 * self.text_match:.0f} %"
        return (
            f"| `{self.spec.replace('|', chr(92) + '|')}` | {self.transformer_ms:.0f} | "
            f"{self.transformer_speedup:.2f}x | {self.end_to_end_speedup:.2f}x | {100 * self.flops_ratio:.0f} % | "
            f"{self.psnr['mean']:.1f} | {self.psnr['p10']:.1f} | {self.foreground_psnr['mean']:.1f} | "
            f"{self.ssim['mean']:.3f} | {match} |"
        )


HEADER = (
    "| policy | transformer ms | speed-up | end to end | FLOPs | PSNR dB | p10 | drawing only | SSIM | text match |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def draw(pipe: Pipeline, prompts: Sequence[str], spec: str, seed: int, batch: int = 8) -> tuple[np.ndarray, float]:
    """All prompts in batches; uint8 pictures and run / full FLOPs."""
    images, run, full = [], 0, 0
    for i in range(0, len(prompts), batch):
        out = pipe.generate(prompts[i : i + batch], seed=seed, policy=load_policy(spec), output_type="np")
        images.append(stack_uint8(out.images))
        run, full = run + out.report.flops_run, full + out.report.flops_full
    return np.concatenate(images), run / full


def clock(pipe: Pipeline, prompts: Sequence[str], spec: str) -> tuple[float, float, float, float]:
    """Medians at batch 1, alternating with the full run: transformer ms, total ms, and both speed-ups."""
    own_t, own_e, ratio_t, ratio_e = [], [], [], []
    for prompt in prompts:
        full = pipe.generate(prompt, seed=0, policy="full").report.ms
        own = pipe.generate(prompt, seed=0, policy=load_policy(spec)).report.ms
        own_t.append(own.transformer)
        own_e.append(own.total)
        ratio_t.append(full.transformer / own.transformer)
        ratio_e.append(full.total / own.total)
    median = statistics.median
    return median(own_t), median(own_e), median(ratio_t), median(ratio_e)


class Matcher:
    """Text match: is a picture's own label the nearest of all labels?"""

    def __init__(self, model: str, labels: Sequence[str]) -> None:
        from foveate.eval.quality import TextMatch  # noqa: PLC0415 - needs the eval extra

        self.heads = TextMatch.bundled()
        self.labels = list(labels)
        self.texts = TextEncoder.from_folder(find_folder(Origin(name_or_path=model))).pooled(self.labels).numpy()

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """Share of pictures whose label comes first."""
        from foveate.eval.features import features  # noqa: PLC0415

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
        points = sorted((r.transformer_speedup, r.psnr["mean"]) for r in results if r.family == family)
        if family == "full" or not points:
            continue
        control = family in (
            "skip-scales",
            "drop-branch",
            "random-tokens",
            "uniform-depth",
        )
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


def measure(pipe: Pipeline, prompts: Sequence[str], timed: Sequence[str], matcher: Matcher | None) -> list[Result]:
    """Every setting, one after the other."""
    results: list[Result] = []
    reference, _ = draw(pipe, prompts, "full", 0)
    for family, specs in SETTINGS.items():
        for spec in specs:
            images, ratio = (reference, 1.0) if spec == "full" else draw(pipe, prompts, spec, 0)
            report = fidelity_report(images, reference).to_json()
            transformer_ms, total_ms, speedup, end_to_end = clock(pipe, timed, spec)
            results.append(
                Result(
                    family=family,
                    spec=spec,
                    psnr=report["psnr"],
                    ssim=report["ssim"],
                    foreground_psnr=report["foreground_psnr"],
                    identical=report["identical"],
                    flops_ratio=ratio,
                    transformer_ms=transformer_ms,
                    total_ms=total_ms,
                    transformer_speedup=speedup,
                    end_to_end_speedup=end_to_end,
                    text_match=matcher.score(images, prompts) if matcher else None,
                )
            )
            print(results[-1].row(), flush=True)
    return results


def main() -> None:
    """Measures, writes JSON, tables and the plot, and fills the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--timed", type=int, default=12, help="prompts that are timed at batch 1")
    parser.add_argument("--labels", type=Path, default=HERE / "labels.txt")
    given = parser.parse_args()
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    pipe = Pipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    matcher = Matcher(given.model, given.labels.read_text(encoding="utf-8").splitlines())
    pipe(prompts[:2], seed=0)
    results = measure(pipe, prompts, prompts[: given.timed], matcher)
    reference, other = draw(pipe, prompts, "full", 0)[0], draw(pipe, prompts, "full", 1000)[0]
    yardstick = fidelity_report(other, reference).to_json()
    data = {
        "model": given.model,
        "prompts": len(prompts),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "dtype": "float32",
        "yardstick": yardstick,
        "results": [{name: getattr(r, name) for name in Result.__slots__} for r in results],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "frontier.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    plot(results, yardstick["psnr"]["mean"], given.out / "frontier.png")
    decibel = yardstick["psnr"]
    seed_row = (
        f"| *another seed* | - | - | - | 100 % | {decibel['mean']:.1f} | {decibel['p10']:.1f} | "
        f"{yardstick['foreground_psnr']['mean']:.1f} | {yardstick['ssim']['mean']:.3f} | - |"
    )
    controls = ("full", "skip-scales", "drop-branch")
    tables = {
        name: "\n".join([HEADER, *(r.row() for r in results if r.family in (*controls, name)), seed_row])
        for name in SETTINGS
    }
    headline = (
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
    )
    tables["readme"] = "\n".join([HEADER, *(r.row() for r in results if r.spec in headline), seed_row])
    tables["all"] = "\n".join([HEADER, *(r.row() for r in results), seed_row])
    (given.out / "frontier.md").write_text(tables["all"] + "\n", encoding="utf-8")
    fill_pages(tables)


if __name__ == "__main__":
    main()
