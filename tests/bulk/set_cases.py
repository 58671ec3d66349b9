"""Small files of the form that evaluation sets publish, with prompts of our own, and runs of them."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.bulk.manifest import Item
from foveate.bulk.output import OutputFolder
from foveate.bulk.rows import Row
from foveate.bulk.sets import open_set

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of our kite"},
    {
        "tag": "counting",
        "include": [{"class": "kite", "count": 2}],
        "exclude": [{"class": "kite", "count": 3}],
        "prompt": "a photo of two of our kites",
    },
]
SIDE = 16


def write_geneval(folder: Path) -> Path:
    """Lines as `json.dumps` writes them, which is how the project's are."""
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return path


def write_dpg(folder: Path) -> Path:
    """A folder of prompts."""
    path = folder / "prompts"
    path.mkdir()
    (path / "0.txt").write_text("Our long first prompt.")
    (path / "whoops7.txt").write_text("Our second, with an emu.")
    return path


def write_dpg_questions(folder: Path) -> Path:
    """The table of questions of the same prompts."""
    path = folder / "dpg_bench.csv"
    path.write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n"
        '0,Our long first prompt.,,1,0,entity,whole,entity - whole (prompt),"Is it long, and first?"\n'
        "0,Our long first prompt.,,2,1,attribute,size,attribute - size (long),Is it long?\n"
        'whoops7,"Our second, with an emu.",,1,0,entity,whole,entity - whole (emu),Is there an emu?\n'
    )
    return path


def write_parti(folder: Path) -> Path:
    """Tabs, no quoting, and a prompt that begins with a quotation mark; some lines end with CRLF."""
    path = folder / "PartiPrompts.tsv"
    path.write_bytes(
        b"Prompt\tCategory\tChallenge\tNote\n"
        b'"O U R S" on a wall\tIllustrations\tWriting & Symbols\t\r\n'
        b"ours\tAbstract\tBasic\tone word\n"
    )
    return path


def write_drawbench(folder: Path) -> Path:
    """As a spreadsheet is exported."""
    path = folder / "DrawBench.csv"
    path.write_text('"Prompts","Category"\n"Our red one, and a blue one.","Colors"\n"Three of ours.","Counting"\n')
    return path


def write_hps(folder: Path) -> Path:
    """A folder of four lists, and the one of DrawBench that lies beside them."""
    path = folder / "benchmark"
    path.mkdir()
    for style in ("photo", "anime", "paintings", "concept-art"):
        (path / f"{style}.json").write_text(json.dumps([f"our {style} {index}" for index in range(2)]))
    (path / "drawbench.json").write_text(json.dumps(["ours of another set"]))
    return path


def write_imagereward(folder: Path) -> Path:
    """A list of objects."""
    path = folder / "benchmark-prompts.json"
    path.write_text(json.dumps([{"id": "005695-0057", "prompt": "our ship"}, {"id": "000001-0002", "prompt": "ours"}]))
    return path


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "geneval": write_geneval,
    "dpg": write_dpg,
    "parti": write_parti,
    "drawbench": write_drawbench,
    "hps": write_hps,
    "imagereward": write_imagereward,
}


def rows_of(name: str, path: Path) -> list[Row]:
    """All rows of a set's file."""
    source, scan = open_set(name, path)
    return [row for row in source.read(0, scan.num_rows) if isinstance(row, Row)]


def pixels_of(row: int, image: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """An image that is unlike all others."""
    seed = int.from_bytes(hashlib.sha256(b"%d %d" % (row, image)).digest()[:4])
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, form: str = "png") -> bytes:
    """A file of an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"lossless": True} if form == "webp" else {}))
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    """The pixels of a file."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def item_of(row: Row, image: int, form: str = "png", pixels: np.ndarray | None = None, **entry: Any) -> Item:
    """An image of a row as a run keeps it."""
    pixels = pixels_of(row.index, image) if pixels is None else pixels
    own = {
        "row": row.index, "id": row.id, "image": image, "prompt": row.prompt, "seed": 100 * row.index + image,
        "policy": "full", "policy_fingerprint": "f", "model": "toy", "width": pixels.shape[1],
        "height": pixels.shape[0], "format": form, "flops_run": 60, "flops_full": 100, "extra": dict(row.extra),
    }  # fmt: skip
    return Item({**own, **entry}, encoded(pixels, form))


def failure_of(row: Row, image: int | None) -> Item:
    """An image, or a whole row, that failed."""
    entry = {"row": row.index, "id": row.id, "image": image, "prompt": row.prompt, "error": "no", "attempts": 2}
    return Item(entry, None)


def run_of(path: Path, shards: Mapping[int, list[Item]], **config: Any) -> OutputFolder:
    """A run with these shards published."""
    output = OutputFolder.create(path, {"output": {"container": "tar"}, **config})
    for number, items in shards.items():
        with output.shard(number) as shard:
            shard.append(items)
            shard.publish()
    return output
