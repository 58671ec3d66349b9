"""A corpus folder of coloured shapes, in the files that `load_corpus` reads."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from foveate.train.captions import Drawing

NAMES = ("cat", "dog", "apple", "boat", "lamp", "house", "rocket", "bottle", "chair", "spoon", "guitar", "clock")
STYLES = ("noto", "twemoji")
HELD_OUT = (3, 14)
SIDE = 128


def shape(concept: int, style: str) -> np.ndarray:
    """A square in one style and a disc in the other, in the colour of its concept."""
    image = np.zeros((SIDE, SIDE, 4), np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    is_inside = (np.maximum(abs(y), abs(x)) < 50) if style == "noto" else (y**2 + x**2 < 55**2)
    image[is_inside] = (*np.random.default_rng(concept).integers(0, 256, 3), 255)
    return image


def write_toy_corpus(place: Path) -> Path:
    """Writes a corpus of twelve concepts in two styles, two pairs held out; returns its folder."""
    place.mkdir()
    pairs = [(concept, style) for style in STYLES for concept in range(len(NAMES))]
    np.save(place / "images.npy", np.stack([shape(concept, style) for concept, style in pairs]))
    drawings = [
        Drawing(
            index=i, code_point=f"{concept:x}", label=NAMES[concept], style=style, group="objects", subgroup="toy",
            synonyms=(), keywords=(), split="test" if i in HELD_OUT else "train",
        )
        for i, (concept, style) in enumerate(pairs)
    ]  # fmt: skip
    (place / "drawings.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in drawings))
    (place / "manifest.json").write_text("{}")
    return place
