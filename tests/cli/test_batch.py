"""`foveate batch`: what it prints and writes, what it refuses before it loads, and an image made again by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.bulk.output import OutputFolder

Run = Callable[..., Any]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three rows, one of which the model refuses."""
    path = tmp_path / "rows.csv"
    path.write_text(
        'caption,seed,policy,n,size\n"a red cat, left",7,skip-scales:count=3,2,\na dog,,,,\nrocket,,,,17x17\n'
    )
    return path


def test_rows_become_shards_and_a_report(run: Run, rows: Path, toy_folder: Path) -> None:
    command = ("batch", rows, "-o", "out", "-m", toy_folder, "--column", "prompt=caption", "-p", "skip-scales:count=3")
    ran = run(*command, "--json")
    assert (ran.code, ran.err) == (1, "")
    data = ran.data
    assert {name: data[name] for name in ("output", "shards", "failed", "images", "failures")} == {
        "output": "out", "shards": 1, "failed": 1, "images": 3, "failures": 1,
    }  # fmt: skip
    assert 0 < data["flops"]["run"] < data["flops"]["full"]
    assert "size must be one of" in data["errors"][0]
    output = OutputFolder.read(Path("out"))
    entries = [entry for entry in output.entries() if "error" not in entry]
    assert [(e["prompt"], e["image"], e["seed"]) for e in entries[:2]] == [
        ("a red cat, left", 0, 7), ("a red cat, left", 1, 8),
    ]  # fmt: skip
    again = run(*command)
    assert again.code == 1
    assert "0 now" in again.out
    assert "1 of all, see out/failed.jsonl" in again.out
    run(*command, "--temperature", "0.7").assert_refused("other settings", "temperature")
    Path("one.png").write_bytes(output.content(entries[1]))
    assert run("generate", "--from", "one.png", "-m", toy_folder, "-o", ".", "--json").data["identical"] is True


def test_a_dry_run_writes_nothing(run: Run, rows: Path, toy_folder: Path) -> None:
    command = ("batch", rows, "-o", "out", "-m", toy_folder, "--column", "prompt=caption", "--dry-run")
    data = run(*command, "--json").data
    assert (data["rows"], data["bad_rows"], data["images"], data["shards"]) == (3, 1, 3, 1)
    assert data["seconds"] > 0 < data["disk_bytes"]
    assert not Path("out").exists()
    ran = run(*command)
    assert "3, 1 of them cannot run" in ran.out


def test_jobs_of_an_array_share_a_folder(run: Run, tmp_path: Path, toy_folder: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("a cat\na dog\nrocket\n")
    command = ("batch", path, "-o", "out", "-m", toy_folder, "-p", "skip-scales:count=3", "--shard-size", 1, "--json")
    assert [run(*command, "--shard", f"{k}/2").data["images"] for k in (1, 2)] == [2, 1]
    assert run(*command).data["images"] == 0
    assert [entry["prompt"] for entry in OutputFolder.read(Path("out")).entries()] == ["a cat", "a dog", "rocket"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shard", "0/2"), "adds 1"),
        (("--shard", "x"), "--shard must be k/n"),
        (("--shard-size", "0"), "--shard-size must be 1 to"),
        (("--retries", "-1"), "--retries must be 0 to"),
        (("--limit", "1" + "0" * 26), "--limit must be 1 to"),
        (("--threads", "1" + "0" * 20), "--threads must be 1 to 4096"),
        (("--engine", "ray", "--num-workers", "0"), "--num-workers must be 1 to"),
        (("--budget", "0.0001"), "of the FLOPs on this schedule"),
        (("--batch-size", "1000000"), "does not fit into memory"),
        (("--num-workers", "2"), "--num-workers is for --engine ray"),
        (("--column", "caption"), "--column must be NAME=COLUMN"),
        (("--column", "seed=a", "--column", "seed=b"), "--column names seed twice"),
        (("--size", "17x17"), "size must be one of"),
        (("-p", "none-such"), "no policy 'none-such'"),
        (("--quality", "7"), "png is lossless"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, toy_folder: Path, flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "rows.txt").write_text("a cat\n")
    run("batch", "rows.txt", "-o", "out", "-m", toy_folder, *flags).assert_refused(message)
    assert not Path("out").exists()


def test_a_configuration_file_gives_flags(run: Run, tmp_path: Path, toy_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a cat"}))
    (tmp_path / "run.yaml").write_text("batch:\n  policy: skip-scales:count=3\n  format: jpg\n")
    assert run("batch", "rows.jsonl", "-o", "out", "-m", toy_folder, "--config", "run.yaml").code == 0
    (entry,) = OutputFolder.read(Path("out")).entries()
    assert (entry["policy"], entry["format"]) == ("skip-scales:count=3", "jpeg")


def test_an_evaluation_set_also_becomes_the_folder_of_its_scorer(run: Run, tmp_path: Path, toy_folder: Path) -> None:
    record = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(record))
    command = ("batch", "evaluation_metadata.jsonl", "--prompts-set", "geneval", "-m", toy_folder, "--json")
    cheap = ("-p", "skip-scales:count=3")
    assert run(*command, *cheap, "-o", "out").data["images"] == 4
    samples = sorted(path.name for path in Path("out/geneval/00000/samples").iterdir())
    assert samples == [f"{index:05d}.png" for index in range(4)]
    assert run(*command, *cheap, "-o", "few", "-n", 1).data["images"] == 1
    run(*command, "-o", "x", "--column", "prompt=text").assert_refused("knows its columns")


def test_the_output_does_not_lie_in_the_input(run: Run, tmp_path: Path, toy_folder: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").write_text("a cat\n")
    run("batch", "rows", "-o", "rows/out", "-m", toy_folder).assert_refused("lies in the input folder")


def test_a_dry_run_says_what_odd_rows_do_and_goes_on(run: Run, tmp_path: Path, toy_folder: Path) -> None:
    rows = [{"prompt": "a cat"}, {"prompt": "a cat", "seed": -1}, {"prompt": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("out").mkdir()
    data = run("batch", "rows.jsonl", "-o", "out", "-m", toy_folder, "--dry-run", "--json").data
    assert (data["rows"], data["bad_rows"]) == (3, 1)
    assert "seed must be" in data["errors"][0]
    assert list(Path("out").iterdir()) == []
