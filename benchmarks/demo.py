"""Generates four images with the full model, two methods and two trivial controls; says what each saved and cost.

Everything runs on the bundled model and the CPU; nothing is downloaded. Times are medians of a few rounds in which the
policies take turns, after a warm-up, so that a machine that slows down slows all of them. Fidelity is the resemblance
to our own full run with the same draws; the yardstick is how much alike two seeds of the full run are.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from foveate.core.atomic import replace_file
from foveate.core.errors import FoveateError
from foveate.eval.compare import compare
from foveate.eval.report import ComparisonReport
from foveate.pipeline.output import PipelineOutput
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.provenance import save_image

PROMPTS = ("a hamburger", "a strawberry", "a cactus", "a red car")
POLICIES = ("full", "ld-pruning", "depthvar", "skip-scales", "drop-branch")
SEED = 7
ROUNDS = 3
MARGIN = 28
"""Pixels above a column and between rows, for the labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """All rounds of one policy; the images of every round are the same."""

    policy: str
    rounds: tuple[PipelineOutput, ...]

    @property
    def output(self) -> PipelineOutput:
        """The latest round."""
        return self.rounds[-1]

    @property
    def pictures(self) -> list[Image.Image]:
        """One image per prompt."""
        return list(self.output.images)

    def ms(self, part: str) -> float:
        """Median over the rounds of `transformer`, `decoder` or `total`."""
        return median(float(getattr(output.report.ms, part)) for output in self.rounds)


def draw(pipe: Pipeline, policies: tuple[str, ...], rounds: int) -> list[Drawn]:
    """Generates all prompts as one batch with every policy in turn, once to warm up and then `rounds` times."""
    found: dict[str, list[PipelineOutput]] = {policy: [] for policy in policies}
    for _ in range(rounds + 1):
        for policy in policies:
            found[policy].append(pipe(PROMPTS, seed=SEED, policy=policy, output_type="pil"))
    return [Drawn(policy=policy, rounds=tuple(outputs[1:])) for policy, outputs in found.items()]


def contact_sheet(drawn: list[Drawn]) -> Image.Image:
    """One row per policy, one column per prompt."""
    width, height = drawn[0].pictures[0].size
    sheet = Image.new("RGB", (len(PROMPTS) * width, MARGIN + len(drawn) * (height + MARGIN)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for column, prompt in enumerate(PROMPTS):
        pen.text((column * width + width // 2, MARGIN // 2), prompt, fill="black", font=font, anchor="mm")
    for row, side in enumerate(drawn):
        top = MARGIN + row * (height + MARGIN)
        report = side.output.report
        label = f"{side.policy}: {report.flops_ratio:.0%} of the FLOPs, {side.ms('total'):.0f} ms"
        pen.text((8, top + MARGIN // 2), label, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(side.pictures):
            sheet.paste(picture, (column * width, top + MARGIN))
    return sheet


def summary(drawn: list[Drawn], comparisons: dict[str, ComparisonReport]) -> Table:
    """What every policy ran, how long it took and how near it came."""
    table = Table(title=f"{len(PROMPTS)} images, seed {SEED}, medians of {len(drawn[0].rounds)} rounds")
    for name in ("policy", "transformer", "decoder", "total", "speedup", "FLOPs", "tokens", "PSNR", "SSIM"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    full_ms = drawn[0].ms("total")
    for side in drawn:
        report, comparison = side.output.report, comparisons.get(side.policy)
        table.add_row(
            side.policy,
            *(f"{side.ms(part):.0f} ms" for part in ("transformer", "decoder", "total")),
            f"{full_ms / side.ms('total'):.2f}x",
            f"{report.flops_ratio:.1%}",
            f"{report.tokens_run} of {report.tokens_full}",
            f"{comparison.fidelity.psnr.mean:.1f} dB" if comparison else "reference",
            f"{comparison.fidelity.ssim.mean:.3f}" if comparison else "reference",
        )
    if comparisons:
        yardstick = next(iter(comparisons.values())).yardstick_psnr
        table.caption = f"Yardstick: {yardstick:.1f} dB PSNR between two seeds of the full run."
    return table


def save(drawn: list[Drawn], comparisons: dict[str, ComparisonReport], folder: Path) -> list[Path]:
    """Writes the images (each can be generated again with `foveate generate --from`), the sheet and the reports."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for side in drawn:
        for row, (prompt, picture) in enumerate(zip(PROMPTS, side.pictures, strict=True)):
            paths.append(folder / f"{side.policy}-{prompt.replace(' ', '-')}.png")
            save_image(picture, paths[-1], side.output.row_config(row))
    for policy, comparison in comparisons.items():
        paths.append(comparison.to_html(folder / f"{policy}-against-full.html"))
    paths.append(folder / "sheet.png")
    with replace_file(paths[-1]) as partial:
        contact_sheet(drawn).save(partial, format="PNG")
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description="Generates four images with five policies and compares them.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for images and reports")
    parser.add_argument("--model", default="emoji", help="a bundled model, or a folder")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds per policy")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {arguments.rounds}")
    try:
        pipe = Pipeline.from_pretrained(arguments.model)
        pipe.set_progress_bar_config(disable=True)
        drawn = draw(pipe, POLICIES, arguments.rounds)
        comparisons = {
            policy: compare(pipe, policy, PROMPTS, first_seed=SEED, runs=arguments.rounds) for policy in POLICIES[1:]
        }
        paths = save(drawn, comparisons, arguments.output)
    except (FoveateError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    Console(width=110).print(summary(drawn, comparisons))
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
