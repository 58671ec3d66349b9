"""Layouts: folders as scorers read them, written from a run, again at will, and never twice the same file."""

import json
from pathlib import Path

import numpy as np
import pytest

from foveate.bulk.output import OutputFolder
from foveate.bulk.sets import SETS, write_layout
from foveate.core.errors import FoveateError
from tests.bulk.set_cases import (
    GENEVAL,
    SIDE,
    WRITERS,
    decoded,
    encoded,
    failure_of,
    item_of,
    pixels_of,
    rows_of,
    run_of,
)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _run(name: str, folder: Path, num_images: int, form: str = "png") -> OutputFolder:
    rows = rows_of(name, WRITERS[name](folder))
    items = [item_of(row, image, form) for row in rows for image in range(num_images)]
    return run_of(folder / "out", {0: items}, set=name)


EXPECTED = {
    "geneval": [
        "00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png",
        "00001/metadata.jsonl", "00001/samples/00000.png", "00001/samples/00001.png",
    ],
    "dpg": ["0.png", "whoops7.png"],
    "parti": ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png", "metadata.jsonl"],
    "drawbench": ["00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png", "metadata.jsonl"],
    "hps": [f"{style}/0000{i}.jpg" for style in ("anime", "concept-art", "paintings", "photo") for i in range(2)],
    "imagereward": ["000001-0002_0.png", "000001-0002_1.png", "005695-0057_0.png", "005695-0057_1.png"],
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_folder_is_what_the_scorer_reads(name: str, tmp_path: Path) -> None:
    output = _run(name, tmp_path, 2)
    num_rows = len({entry["row"] for entry in output.entries()})
    assert write_layout(name, output, tmp_path / "lay" / "images") == num_rows
    assert _files(tmp_path / "lay" / "images") == EXPECTED[name]
    assert _files(tmp_path / "lay") == sorted([f"images/{one}" for one in EXPECTED[name]] + ["images.layout.json"])


@pytest.mark.parametrize("form", ["png", "webp"])
def test_geneval_has_the_published_line_and_the_pixels_of_the_run(form: str, tmp_path: Path) -> None:
    write_layout("geneval", _run("geneval", tmp_path, 2, form), tmp_path / "images")
    for index, line in enumerate(GENEVAL):
        folder = tmp_path / "images" / f"{index:05d}"
        assert (folder / "metadata.jsonl").read_text() == json.dumps(line)
        for image in range(2):
            content = (folder / "samples" / f"{image:05d}.png").read_bytes()
            assert content.startswith(b"\x89PNG")
            np.testing.assert_array_equal(decoded(content), pixels_of(index, image))


def test_dpg_bench_finds_every_image_where_it_cuts(tmp_path: Path) -> None:
    write_layout("dpg", _run("dpg", tmp_path, 4), tmp_path / "images")
    grid = decoded((tmp_path / "images" / "whoops7.png").read_bytes())
    assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
    # Left and upper edges of the cuts, in the order of dpg_bench/compute_dpg_bench.py.
    for image, (left, upper) in enumerate([(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]):
        np.testing.assert_array_equal(grid[upper : upper + SIDE, left : left + SIDE], pixels_of(1, image))


def test_dpg_bench_refuses_what_its_scorer_cannot_cut(tmp_path: Path) -> None:
    rows = rows_of("dpg", WRITERS["dpg"](tmp_path))
    wide = run_of(tmp_path / "wide", {0: [item_of(rows[0], 0, pixels=pixels_of(0, 0, 32, 16))]}, set="dpg")
    with pytest.raises(FoveateError, match="scores squares of one size, 0 has images of 32x16"):
        write_layout("dpg", wide, tmp_path / "a")
    many = run_of(tmp_path / "many", {0: [item_of(rows[0], image) for image in range(5)]}, set="dpg")
    with pytest.raises(FoveateError, match="up to 4 images a prompt, 0 has 5"):
        write_layout("dpg", many, tmp_path / "b")


def test_an_image_folder_says_what_its_images_are(tmp_path: Path) -> None:
    write_layout("parti", _run("parti", tmp_path, 1), tmp_path / "images")
    lines = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["00000-0.png", "00001-0.png"]
    assert lines[0]["prompt"] == '"O U R S" on a wall'
    assert (lines[1]["Category"], lines[1]["Note"], lines[1]["seed"]) == ("Abstract", "one word", 100)


def test_hpsv2_keeps_a_jpeg_as_it_is(tmp_path: Path) -> None:
    rows = rows_of("hps", WRITERS["hps"](tmp_path))
    output = run_of(tmp_path / "out", {0: [item_of(rows[0], 0, "jpeg"), item_of(rows[1], 0)]}, set="hps")
    write_layout("hps", output, tmp_path / "images")
    first, second = ((tmp_path / "images" / "anime" / f"0000{i}.jpg").read_bytes() for i in range(2))
    assert first == encoded(pixels_of(0, 0), "jpeg")
    assert second == encoded(pixels_of(1, 0), "jpeg"), "as Pillow writes it by default"


def test_a_layout_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    rows = rows_of("geneval", WRITERS["geneval"](tmp_path))
    output = run_of(tmp_path / "out", {0: [item_of(rows[0], 0)]}, set="geneval")
    into = tmp_path / "images"
    assert write_layout("geneval", output, into) == 1
    kept, cut = into / "00000" / "metadata.jsonl", into / "00000" / "samples" / "00000.png"
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    (into / "00000" / ".foveate-0123.part").write_bytes(b"of a process that was killed")
    with output.shard(1) as shard:
        shard.append([item_of(rows[1], 0)])
        shard.publish()
    assert write_layout("geneval", output, into) == 2
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert cut.read_bytes() == whole
    assert _files(into) == [
        "00000/metadata.jsonl", "00000/samples/00000.png", "00001/metadata.jsonl", "00001/samples/00000.png",
    ]  # fmt: skip


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    output = _run("geneval", tmp_path, 1)
    other = run_of(tmp_path / "other", {0: []}, set="geneval", seed=8)
    write_layout("geneval", output, tmp_path / "images")
    with pytest.raises(FoveateError, match="holds the images of another run"):
        write_layout("geneval", other, tmp_path / "images")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FoveateError, match="mine is not empty"):
        write_layout("geneval", output, tmp_path / "mine")
    with pytest.raises(FoveateError, match="was generated from the set geneval; a layout of dpg needs"):
        write_layout("dpg", output, tmp_path / "dpg")


@pytest.mark.parametrize(
    ("name", "files", "told"),
    [
        ("geneval", ["00000/metadata.jsonl", "00000/samples/00001.png"], "1 rows are left out and 1 lack images"),
        ("dpg", [], "2 rows are left out and 0 lack images"),
        ("imagereward", [], "the scorer does not run without them"),
        ("parti", ["00000-1.png", "metadata.jsonl"], "1 rows are left out and 1 lack images"),
    ],
)
def test_what_failed_is_left_out_and_said(name: str, files: list[str], told: str, tmp_path: Path) -> None:
    rows = rows_of(name, WRITERS[name](tmp_path))
    items = [failure_of(rows[0], 0), item_of(rows[0], 1), failure_of(rows[1], None)]
    lines: list[str] = []
    assert write_layout(name, run_of(tmp_path / "out", {0: items}, set=name), tmp_path / "images", lines.append) == 0
    assert _files(tmp_path / "images") == files
    assert len(lines) == 1
    assert told in lines[0]
