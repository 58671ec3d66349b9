"""Folders as the scorers of evaluation sets read them, written from the published shards of a run.

Files appear complete or not at all. What is there is kept, so the same call goes on after an interruption, and adds
what was published since. A row's images are in memory, nothing else.

A folder holds a layout of one run: a file beside it, `<folder>.layout.json`, says which, as scorers trip over files in
the folder that are not theirs.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from PIL import Image

from foveate.bulk.output import OutputFolder
from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError

JPEG_QUALITY = 75
"""Pillow's default, which the code has that HPSv2's README gives for writing images."""

_GRID_SIDE = 2
_LEFT_OVERS = ".foveate-*.part"

Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutFile:
    """A file of a layout.

    Attributes:
        path: Relative, with slashes.
        content: Gives its bytes.
        size: Of a file that is whole, where it is known without making it.
    """

    path: str
    content: Callable[[], bytes]
    size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowImages:
    """What a run has of one row: entries of its images in order, and how to get an image's bytes."""

    entries: tuple[Entry, ...]
    is_complete: bool
    content: Callable[[Entry], bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a set's folder looks.

    Attributes:
        files: Files of a row that has an image at least.
        needs_all: Whether a row of which an image failed is left out.
        describes: What `metadata.jsonl` says of every image; None writes no such file.
        needs_all_rows: Whether the scorer cannot do without a row.
    """

    files: Callable[[RowImages], Iterator[LayoutFile]]
    needs_all: bool = False
    describes: Callable[[Entry], dict[str, Any]] | None = None
    needs_all_rows: bool = False


def write_files(
    layout: Layout, name: str, output: OutputFolder, into: Path, warn: Callable[[str], object] | None
) -> int:
    """Writes what is missing of a layout.

    Args:
        layout: How the folder looks.
        name: Of the set.
        output: A run, finished or not.
        into: The folder; made if it is not there.
        warn: Is told in one line what is left out.

    Returns:
        Rows that the folder now holds whole.

    Raises:
        FoveateError: The folder holds something else, a file cannot be read or written, or images that the scorer
            cannot take.
    """
    into = into.absolute()
    _claim(into, name, output)
    whole = partly = without = 0
    with ExitStack() as stack:
        lines: IO[bytes] | None = None
        if layout.describes is not None:
            lines = stack.enter_context(stack.enter_context(replace_file(into / "metadata.jsonl")).open("wb"))
        for row in _rows(output):
            if not row.entries or (layout.needs_all and not row.is_complete):
                without += 1
                continue
            for file in layout.files(row):
                _write(into, file)
            if lines is not None and layout.describes is not None:
                lines.writelines(_line(layout.describes(entry)) for entry in row.entries)
            whole += row.is_complete
            partly += not row.is_complete
    if warn is not None and (partly or without):
        broken = "; the scorer does not run without them" if layout.needs_all_rows else ""
        warn(f"{into}: {without} rows are left out and {partly} lack images, as generating them failed{broken}")
    return whole


def geneval_files(row: RowImages) -> Iterator[LayoutFile]:
    """`00000/metadata.jsonl`, the row's line of the set, and `00000/samples/00000.png`, ...

    Source: djghosh13/geneval, README.md and generation/diffusers_generate.py; evaluation/evaluate_images.py reads only
    folders whose names are digits, and images named `<digits>.png`.
    """
    first = row.entries[0]
    folder = f"{first['row']:05d}"
    metadata = json.dumps({**first["extra"], "prompt": first["prompt"]}).encode()
    yield LayoutFile(path=f"{folder}/metadata.jsonl", content=lambda: metadata, size=len(metadata))
    for entry in row.entries:
        yield _png(f"{folder}/samples/{entry['image']:05d}.png", entry, row)


def dpg_files(row: RowImages) -> Iterator[LayoutFile]:
    """`<id>.png`: up to four images in a grid of two by two; one alone is the file itself.

    Source: TencentQQGYLab/ELLA, README.md, and dpg_bench/compute_dpg_bench.py, which cuts squares of `--resolution`
    pixels out at (0, 0), (1, 0), (0, 1) and (1, 1), and finds the prompt by the name up to the first dot.

    Raises:
        FoveateError: More images, or some that are no squares of one size.
    """
    entries = row.entries
    sizes = {(entry["width"], entry["height"]) for entry in entries}
    if len(entries) > _GRID_SIDE**2:
        raise FoveateError(f"DPG-Bench scores up to 4 images a prompt, {entries[0]['id']} has {len(entries)}")
    if len(sizes) > 1 or any(width != height for width, height in sizes):
        there = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise FoveateError(f"DPG-Bench scores squares of one size, {entries[0]['id']} has images of {there}")
    path = f"{entries[0]['id']}.png"
    if len(entries) == 1:
        yield _png(path, entries[0], row)
    else:
        yield LayoutFile(path=path, content=lambda: _grid([row.content(entry) for entry in entries]))


def hps_files(row: RowImages) -> Iterator[LayoutFile]:
    """`<style>/00000.jpg`, counted within the style; the first image of a prompt.

    Source: tgxs002/HPSv2, README.md ("Custom Evaluation") and hpsv2/evaluation.py (`BenchmarkDataset`).
    """
    first = row.entries[0]
    if first["image"] != 0:
        return
    path = f"{first['extra']['style']}/{first['extra']['style_index']:05d}.jpg"
    if first["format"] == "jpeg":
        yield LayoutFile(path=path, content=lambda: row.content(first), size=first["bytes"])
    else:
        yield LayoutFile(path=path, content=lambda: _encoded(_open(row.content(first)), "JPEG", quality=JPEG_QUALITY))


def imagereward_files(row: RowImages) -> Iterator[LayoutFile]:
    """`<id>_0.png`, `<id>_1.png`, ...

    Source: THUDM/ImageReward, test-benchmark.py. It takes as many images a prompt as the folder's number of files
    divided by the number of prompts, so a row that lacks one is left out.
    """
    for entry in row.entries:
        yield _png(f"{entry['id']}_{entry['image']}.png", entry, row)


def image_folder_files(row: RowImages) -> Iterator[LayoutFile]:
    """`00000-0.png`, ..., described by `metadata.jsonl`: what `datasets.load_dataset("imagefolder")` reads.

    Source: huggingface/datasets, docs/source/image_dataset.mdx (ImageFolder).
    """
    for entry in row.entries:
        yield _png(_name_in_folder(entry), entry, row)


def image_folder_line(entry: Entry) -> dict[str, Any]:
    """What `metadata.jsonl` says of an image."""
    own = {"file_name": _name_in_folder(entry), "row": entry["row"], "image": entry["image"], "id": entry["id"]}
    return {**own, "prompt": entry["prompt"], "seed": entry["seed"], **entry["extra"]}


def _name_in_folder(entry: Entry) -> str:
    return f"{entry['row']:05d}-{entry['image']}.png"


def _claim(into: Path, name: str, output: OutputFolder) -> None:
    """Makes the folder this run's, and removes what a killed process left in it."""
    config = json.dumps(output.config, sort_keys=True).encode()
    now = {"set": name, "run": hashlib.sha256(config).hexdigest()}
    mark = into.with_name(f"{into.name}.layout.json")
    try:
        into.mkdir(parents=True, exist_ok=True)
        if mark.is_file():
            if json.loads(mark.read_text(encoding="utf-8")) != now:
                raise FoveateError(f"{into} holds the images of another run or set ({mark}); choose another folder")
        elif next(into.iterdir(), None) is not None:
            raise FoveateError(f"{into} is not empty, and there is no {mark}; choose another folder")
        else:
            write_text(mark, json.dumps(now) + "\n")
        for path in into.rglob(_LEFT_OVERS):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise FoveateError(f"cannot write {into}: {error.strerror or error}; choose another place") from None
    except json.JSONDecodeError as error:
        raise FoveateError(f"cannot read {mark}: {error}; choose another folder") from None


def _rows(output: OutputFolder) -> Iterator[RowImages]:
    for _, group in groupby(output.entries(), key=lambda entry: entry["row"]):
        entries = list(group)
        images = tuple(entry for entry in entries if "error" not in entry)
        yield RowImages(entries=images, is_complete=len(images) == len(entries), content=output.content)


def _write(into: Path, file: LayoutFile) -> None:
    path = into / file.path
    if path.is_file() and file.size in (None, path.stat().st_size):
        return
    content = file.content()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FoveateError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    # On the disk before it has its name: a file that is there counts as whole.
    with replace_file(path) as partial, partial.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _png(path: str, entry: Entry, row: RowImages) -> LayoutFile:
    """An image as PNG: its own bytes, or the pixels of another format."""
    if entry["format"] == "png":
        return LayoutFile(path=path, content=lambda: row.content(entry), size=entry["bytes"])
    return LayoutFile(path=path, content=lambda: _encoded(_open(row.content(entry)), "PNG"))


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _grid(contents: Sequence[bytes]) -> bytes:
    images = [_open(content) for content in contents]
    side = images[0].width
    grid = Image.new("RGB", (_GRID_SIDE * side, _GRID_SIDE * side))
    for index, image in enumerate(images):
        grid.paste(image, (side * (index % _GRID_SIDE), side * (index // _GRID_SIDE)))
    return _encoded(grid, "PNG")


def _encoded(image: Image.Image, name: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
