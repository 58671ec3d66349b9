"""A corpus of coloured squares, as `recipes.emoji.corpus` reads it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from recipes.emoji.captions import STYLE_PHRASES, Drawing

LABELS = ("apple", "pear", "plum", "fig", "melon", "lemon")
GROUPS = ("food-drink", "animals-nature", "smileys-emotion", "people-body", "symbols", "flags")
COLOURS = ((200, 20, 30), (90, 200, 20), (90, 20, 140), (60, 30, 90), (30, 140, 60), (240, 220, 30))


def write_corpus(folder: Path, image_size: int, num_styles: int = 2) -> None:
    """Six things, each a square of its colour, in styles that differ in size; the very first one is held out."""
    folder.mkdir(parents=True)
    count = 6 * num_styles
    images = np.zeros((count, image_size, image_size, 4), dtype=np.uint8)
    drawings = []
    for index in range(count):
        thing, style = index % 6, index // 6
        edge = image_size // (8 - 2 * style)
        images[index, edge:-edge, edge:-edge] = (*COLOURS[thing], 255)
        drawings.append(
            Drawing(
                index=index,
                code_point=f"1f60{thing}",
                label=LABELS[thing],
                style=list(STYLE_PHRASES)[style],
                group=GROUPS[thing],
                subgroup="toy",
                synonyms=(),
                keywords=("round",),
                split="test" if index == 0 else "train",
            )
        )
    np.save(folder / "images.npy", images)
    lines = [json.dumps(asdict(drawing)) for drawing in drawings]
    (folder / "drawings.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
