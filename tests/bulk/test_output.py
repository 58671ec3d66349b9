"""The folder of a bulk run: one configuration, published shards whole, hidden work."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.bulk.output import OutputFolder
from foveate.core.errors import FoveateError
from tests.bulk.bulk_items import CONFIG, a_failure, a_run, an_item, content_of, hidden, visible

CONTAINERS = ("tar", "parquet")


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_is_appended_is_published_in_order_and_read_back(tmp_path: Path, container: str) -> None:
    run = a_run(tmp_path / "out", container)
    with run.shard(3) as shard:
        shard.append([an_item(9), an_item(7, 1)])
        shard.append([an_item(7, 0), a_failure(8)])
        assert visible(tmp_path / "out").keys() == {"run.json"}
        summary = shard.publish()
    assert (summary.num_images, summary.num_failed, summary.image_bytes) == (3, 1, 120)
    assert (summary.flops_run, summary.flops_full) == (6, 9)
    assert run.published() == {3}
    assert run.summary(3) == summary
    again = OutputFolder.read(tmp_path / "out")
    entries = list(again.entries())
    assert [(e["row"], e["image"]) for e in entries] == [(7, 0), (7, 1), (8, None), (9, 0)]
    assert entries[3]["key"] == "000000009-00"
    assert entries[3]["file"] == f"shard-00000003.{container}"
    assert again.content(entries[3]) == content_of(9)
    assert [again.content(entries[i]) for i in (1, 0)] == [content_of(7, 1), content_of(7, 0)]
    assert hidden(tmp_path / "out") == ["run.lock"]


@pytest.mark.parametrize("container", CONTAINERS)
def test_equal_content_gives_equal_bytes_whatever_the_order(tmp_path: Path, container: str) -> None:
    items = [an_item(0), an_item(1), a_failure(2, 0, 1), a_failure(2, 0, 3), a_failure(3), an_item(3, 1)]
    found = set()
    for turn, order in enumerate(itertools.islice(itertools.permutations(items), 0, 720, 150)):
        run = a_run(tmp_path / str(turn), container)
        for item in order:
            # One journal each, as if every worker had been killed.
            with run.shard(0) as shard:
                shard.append([item])
        with run.shard(0) as shard:
            assert shard.done[2, 0]["attempts"] == 3
            shard.publish()
        found.add(tuple(visible(tmp_path / str(turn)).items()))
    assert len(found) == 1
    kept = [(e["row"], e["image"], "error" in e) for e in run.entries()]
    assert kept == [(0, 0, False), (1, 0, False), (2, 0, True), (3, 1, False)]


def test_an_image_is_kept_once_and_replaces_a_failure(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as shard:
        shard.append([a_failure(0, 0)])
        shard.append([an_item(0)])
        shard.append([a_failure(0, 0, 2), an_item(0, content=b"another")])
        assert list(shard.done) == [(0, 0)]
        assert "error" not in shard.done[0, 0]
        assert shard.publish().num_images == 1
    assert run.content(next(run.entries())) == content_of(0)


def test_a_shard_of_failures_has_entries_and_no_images(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    (tmp_path / "out/shard-00000000.tar").write_bytes(b"left by a process that was killed")
    with run.shard(0) as shard:
        shard.append([a_failure(0), a_failure(1)])
        shard.publish()
    assert visible(tmp_path / "out").keys() == {"run.json", "manifest/00000000.jsonl"}
    assert run.write_failed() == 2
    lines = (tmp_path / "out/failed.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a0", "a1"]


def test_failures_are_found_whatever_texts_say(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as shard:
        shard.append([an_item(0, prompt='{"error": 1}', extra={"error": "of the user"})])
        shard.publish()
    assert run.write_failed() == 0
    assert not (tmp_path / "out/failed.jsonl").exists()


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    a_run(tmp_path / "out")
    changed = {**CONFIG, "seed": 8, "output": {"container": "parquet", "format": "png"}}
    with pytest.raises(
        FoveateError, match=r'output.container was "tar", is "parquet"; seed was 7, is 8\. Take'
    ) as said:
        OutputFolder.create(tmp_path / "out", changed)
    assert "\n" not in str(said.value)
    assert a_run(tmp_path / "out").config["seed"] == 7


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FoveateError, match="is no output of `foveate batch`; take a name that is free"):
        a_run(tmp_path)
    with pytest.raises(FoveateError, match="is no folder"):
        a_run(tmp_path / "notes.txt")
    with pytest.raises(FoveateError, match=r"has no run\.json"):
        OutputFolder.read(tmp_path)
    with pytest.raises(FoveateError, match="shards must be tar or parquet, got 'zip'"):
        a_run(tmp_path / "out", "zip")
    run = a_run(tmp_path / "out")
    (tmp_path / "out/run.json").write_text(json.dumps({**run.config, "format": 2}))
    with pytest.raises(FoveateError, match="written in format 2, this version knows 1"):
        OutputFolder.read(tmp_path / "out")
    (tmp_path / "out/run.json").write_text("{")
    with pytest.raises(FoveateError, match="cannot read"):
        a_run(tmp_path / "out")


def test_a_name_is_locked_for_other_processes_alone(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    script = (
        "import sys, pathlib\nfrom foveate.bulk.output import OutputFolder\n"
        "run = OutputFolder.read(pathlib.Path(sys.argv[1]))\n"
        "with run.locked('job-1-of-2'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(FoveateError, match=r"in use by another process \(job-1-of-2\)"), run.locked("job-1-of-2"):
            pass
        with run.locked("job-2-of-2"):
            pass
        child.kill()
        child.wait()
    with run.locked("job-1-of-2"):
        pass


def test_a_folder_travels_to_workers(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as shard:
        shard.append([an_item(0)])
        shard.publish()
    run.content(next(run.entries()))
    there = pickle.loads(pickle.dumps(run))
    assert there.content(next(there.entries())) == content_of(0)


def test_damage_is_named(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    with run.shard(0) as shard:
        shard.append([an_item(0), an_item(1)])
        shard.publish()
    entries = list(run.entries())
    path = tmp_path / "out/shard-00000000.tar"
    path.write_bytes(path.read_bytes().replace(content_of(1), bytes(40)))
    assert run.content(entries[0]) == content_of(0)
    with pytest.raises(FoveateError, match="has a damaged image 000000001-00"):
        run.content(entries[1])
    with pytest.raises(FoveateError, match="has no image 000000005-00"):
        run.content({**entries[0], "key": "000000005-00"})
    part = tmp_path / "out/manifest/00000000.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(FoveateError, match=r"00000000\.jsonl line 2 is damaged"):
        list(run.entries())
    path.unlink()
    with pytest.raises(FoveateError, match="cannot read"):
        OutputFolder.read(tmp_path / "out").content(entries[0])


def test_a_half_surrogate_is_no_reason_to_stop(tmp_path: Path) -> None:
    for container in CONTAINERS:
        run = a_run(tmp_path / container, container)
        with run.shard(0) as shard:
            shard.append([an_item(0, prompt="\ud83d \u2028 ü")])
            shard.publish()
        assert next(run.entries())["prompt"] == "\ud83d \u2028 ü"


def test_times_of_files_decide_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path / "out")
    for row in range(3):
        with run.shard(0) as shard:
            shard.append([an_item(row)])
        for path in (tmp_path / "out").rglob("*"):
            # The clock went back by years between any two workers, and is behind what files say.
            os.utime(path, (2**31 - row * 2**28, 2**31 - row * 2**28))
    with a_run(tmp_path / "out").shard(0) as shard:
        assert set(shard.done) == {(0, 0), (1, 0), (2, 0)}
        shard.publish()
    assert [e["row"] for e in run.entries()] == [0, 1, 2]
