"""Shards are what WebDataset, pyarrow and Hugging Face datasets read; writing them takes bounded memory."""

import gc
import io
import json
import tarfile
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from foveate.bulk.manifest import FIELDS, Item
from foveate.bulk.output import OutputFolder
from foveate.bulk.shards import CONTAINERS
from foveate.bulk.tar_shards import header
from tests.bulk.bulk_items import a_failure, a_run, an_item


def picture(row: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (row, 2 * row, 255 - row))


def encoded(row: int, format_: str) -> bytes:
    file = io.BytesIO()
    picture(row).save(file, format_.upper(), lossless=True)
    return file.getvalue()


def a_full_item(row: int, format_: str = "png") -> Item:
    return an_item(
        row,
        content=encoded(row, format_),
        format=format_,
        negative_prompt=None,
        seed=2**63 - 1 - row,
        warnings=[{"code": "nearly_black", "message": "one colour"}],
        psnr_to_full=31.5,
        extra={"split": "train"},
        width=8,
        height=8,
    )


def published(path: Path, container: str, items: list[Item]) -> OutputFolder:
    run = a_run(path, container)
    with run.shard(0) as shard:
        shard.append(items)
        shard.publish()
    return run


def test_webdataset_reads_a_tar_shard(tmp_path: Path) -> None:
    items = [a_full_item(0), a_full_item(1, "webp"), a_failure(2)]
    run = published(tmp_path, "tar", items)
    entries = list(run.entries())
    with warnings.catch_warnings():
        # It leaves the file to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        shard = wds.WebDataset(str(tmp_path / "shard-00000000.tar"), shardshuffle=False, empty_check=False)
        samples = list(shard.decode("pil"))
        del shard
        gc.collect()
    assert [sample["__key__"] for sample in samples] == ["000000000-00", "000000001-00"]
    for row, (sample, ending) in enumerate(zip(samples, ("png", "webp"), strict=True)):
        assert np.array_equal(np.asarray(sample[ending]), np.asarray(picture(row)))
        assert sample["txt"] == f"prompt {row}"
        assert sample["json"] == entries[row]


def test_headers_are_those_of_tarfile() -> None:
    for name, size in (("000000001-00.png", 0), ("0123456789-100.json", 2**33 - 1), ("a" * 100, 40_961)):
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_tar_members_have_no_times_and_owners(tmp_path: Path) -> None:
    published(tmp_path, "tar", [an_item(0, format="jpeg")])
    path = tmp_path / "shard-00000000.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert [member.name.partition(".")[2] for member in members] == ["jpg", "json", "txt"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_pyarrow_reads_a_parquet_shard_with_images_as_datasets_keeps_them(tmp_path: Path) -> None:
    run = published(tmp_path, "parquet", [a_full_item(0), a_full_item(1), a_failure(2)])
    table = pq.read_table(tmp_path / "shard-00000000.parquet")
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["seed"] == {"dtype": "int64", "_type": "Value"}
    assert list(features) == table.schema.names
    assert set(table.schema.names) == {*FIELDS, "image_index"}
    for row, (found, entry) in enumerate(zip(table.to_pylist(), run.entries(), strict=False)):
        assert found["image"] == {"bytes": encoded(row, "png"), "path": f"{entry['key']}.png"}
        same = ("row", "id", "prompt", "negative_prompt", "seed", "psnr_to_full", "sha256", "bytes", "file", "key")
        assert {name: found[name] for name in same} == {name: entry[name] for name in same}
        assert found["image_index"] == entry["image"]
        assert json.loads(found["warnings"]) == entry["warnings"]
        assert json.loads(found["extra"]) == {"split": "train"}
        assert found["policy"] is None


def test_row_groups_are_small_and_every_image_is_found(tmp_path: Path) -> None:
    run = published(tmp_path, "parquet", [an_item(row) for row in range(230)])
    groups = pq.read_metadata(tmp_path / "shard-00000000.parquet")
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [100, 100, 30]
    entries = list(run.entries())
    for entry in (*entries[::-37], *entries[:3]):
        assert run.content(entry) == an_item(entry["row"]).content


@pytest.mark.parametrize("container", CONTAINERS)
def test_publishing_and_reading_hold_a_part_of_a_shard_at_a_time(tmp_path: Path, container: str) -> None:
    size, count = 2**20, 100
    run = a_run(tmp_path, container)
    with run.shard(0) as shard:
        for row in range(count):
            shard.append([an_item(row, content=row.to_bytes(2, "little") * (size // 2))])
    tracemalloc.start()
    with run.shard(0) as shard:
        shard.publish()
    peaks = [tracemalloc.get_traced_memory()[1]]
    tracemalloc.reset_peak()
    for entry in run.entries():
        run.content(entry)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    # Parquet holds a row group of 32 MB, as Python's bytes and as Arrow's.
    bound = 5 * size if container == "tar" else 80 * size
    assert max(peaks) < bound
    assert pa.default_memory_pool().max_memory() < 100 * size


def test_four_shards_are_remembered(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for number in range(6):
        with run.shard(number) as shard:
            shard.append([an_item(number)])
            shard.publish()
    entries: Iterator[dict] = run.entries(range(5, -1, -1))
    assert [run.content(entry) for entry in entries] == [an_item(row).content for row in range(5, -1, -1)]
    assert len(run._images) == 4
