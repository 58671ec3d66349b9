"""Generates the images of the README and of the policy pages: docs/images.

    python benchmarks/pictures.py

Prompts are those of `forty.txt` and `composed.txt`, in order and unselected, seed 0; a policy page shows the full run
above the policy, the first six prompts and the same draws, and the compute map of the first. Every setting shown stands
in the tables of `frontier.py`, so that an image has its figures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from frontier import SETTINGS
from PIL import Image, ImageDraw, ImageFont

from foveate.pipeline.pipeline import Pipeline
from foveate.viz.maps import compute_map

HERE = Path(__file__).parent
PAGES = {
    "ld-pruning": ("full", "ld-pruning", "ld-pruning:sats=false,lhep_scales=1", "ld-pruning-draft"),
    "depthvar": ("full", "depthvar:reference_scale=-2", "depthvar", "depthvar:reference_scale=-2,fill=identity"),
    "skip-scales": ("full", "skip-scales", "skip-scales:count=2"),
    "drop-branch": ("full", "drop-branch:count=1", "drop-branch", "drop-branch:count=4"),
    "random-tokens": ("full", "random-tokens", "random-tokens:num_scales=1", "ld-pruning:sats=false,lhep_scales=1"),
    "uniform-depth": ("full", "uniform-depth:num_scales=1", "depthvar:reference_scale=-2"),
    "composition": ("full", "drop-branch:count=1|depthvar:reference_scale=-2", "drop-branch"),
}
"""Rows of every page's image; the compute map is that of the second one."""
CELL, TEXT = 128, 16


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], labels: Sequence[str]) -> Image.Image:
    """Images in rows, each row under its name, columns under the prompts."""
    width = CELL * max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (width, TEXT + len(rows) * (CELL + TEXT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, label in enumerate(labels):
        pen.text((i * CELL + 4, 2), label, fill=(110, 116, 128), font=font)
    for r, (name, images) in enumerate(rows):
        top = TEXT + r * (CELL + TEXT)
        pen.text((4, top + 1), name, fill=(32, 36, 44), font=font)
        for i, image in enumerate(images):
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (i * CELL, top + TEXT))
    return sheet


def main() -> None:
    """Generates everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    given = parser.parse_args()
    measured = {spec for specs in SETTINGS.values() for spec in specs}
    unmeasured = sorted({spec for specs in PAGES.values() for spec in specs} - measured)
    if unmeasured:
        parser.error(f"no table has {', '.join(unmeasured)}; add what is shown to SETTINGS of frontier.py")
    given.out.mkdir(parents=True, exist_ok=True)
    files = [HERE / f"{name}.txt" for name in ("forty", "composed")]
    prompts = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pipe = Pipeline.from_pretrained(given.model)
    pipe.set_progress_bar_config(disable=True)
    drawn = [image for i in range(0, len(prompts), 8) for image in pipe(prompts[i : i + 8], seed=0).images]
    sheet = Image.new("RGB", (8 * CELL, -(-len(drawn) // 8) * CELL), "white")
    for i, image in enumerate(drawn):
        sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (i % 8 * CELL, i // 8 * CELL))
    sheet.save(given.out / "readme.png", optimize=True)
    six = prompts[:6]
    for page, specs in PAGES.items():
        outs = [pipe(six, seed=0, policy=spec, trace=True) for spec in specs]
        rows = [(spec, list(out.images)) for spec, out in zip(specs, outs, strict=True)]
        grid(rows, six).save(given.out / f"{page}.png", optimize=True)
        compute_map(rows[1][1][0], outs[1].trace, 0).save(given.out / f"{page}-map.png", optimize=True)


if __name__ == "__main__":
    main()
