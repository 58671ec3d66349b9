"""Whole runs in one process: the same images however they are made, failures that end nothing, and going on."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.bulk.forecast import forecast
from foveate.bulk.output import OutputFolder, Shard
from foveate.bulk.run import Bar, Part, Run, run_local
from foveate.bulk.settings import RunSettings, described
from foveate.bulk.sources import open_source
from foveate.bulk.tasks import seed_of
from foveate.bulk.worker import Worker
from foveate.core.errors import BrokenNumbersError, FoveateError
from foveate.pipeline import bulk
from foveate.pipeline.bulk import BulkSettings
from foveate.pipeline.encoding import Encoder
from foveate.pipeline.loading import Loading
from foveate.pipeline.pipeline import Pipeline

CHEAP = "skip-scales:count=3"
ROWS: list[dict[str, Any]] = [
    {"prompt": "a red cat", "id": "cat"},
    {"prompt": "a big dog", "id": "dog", "policy": "ld-pruning", "n": 3, "seed": 7, "source": "kennel"},
    {"prompt": "the house", "id": "house", "policy": "full"},
    {"prompt": "a red cat", "id": "cat2", "seed": 5, "negative_prompt": "green"},
    {"prompt": "a green apple", "id": "apple", "guidance_scale": 1.5, "n": 2},
    {"prompt": "rocket", "id": "rocket", "temperature": 0.3},
    {"prompt": "two dogs", "id": "dogs", "rng": "reference", "seed": 3, "n": 2},
]


def written(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def settings_of(**changes: Any) -> RunSettings:
    settings = RunSettings(loading=Loading(model="toy"), options={"policy": CHEAP}, shard_size=3)
    return replace(settings, **changes)


class Made:
    """A run over rows of a file, in a folder."""

    def __init__(self, pipe: Pipeline, path: Path, out: Path, settings: RunSettings) -> None:
        # A run changes its pipeline, and this one is that of all tests.
        self.pipe, self.settings = Pipeline(pipe.model), settings
        self.source, self.scan = open_source(path, {}, settings.shard_size, None)
        config = settings.config(described(pipe, settings.loading), input={"sha256": self.scan.sha256})
        self.output = OutputFolder.create(out, config)

    @property
    def left(self) -> list[int]:
        numbers = Part().shards(-(-self.scan.num_rows // self.settings.shard_size))
        return [number for number in numbers if number not in self.output.published()]

    def run(self, shards: Sequence[int] | None = None) -> Run:
        return Run(
            settings=self.settings,
            source=self.source,
            output=self.output,
            shards=self.left if shards is None else shards,
            bar=Bar(self.scan.num_rows, is_hidden=True),
        )

    def __call__(self, shards: Sequence[int] | None = None, **options: Any) -> list[dict[str, Any]]:
        self.tally = run_local(self.pipe, self.run(shards), **options)
        self.output.write_failed()
        return list(self.output.entries())

    def pixels(self) -> dict[tuple[str, int], np.ndarray]:
        found = {}
        for entry in self.output.entries():
            if "error" not in entry:
                with Image.open(io.BytesIO(self.output.content(entry))) as image:
                    found[entry["id"], entry["image"]] = np.asarray(image)
        return found


def expected(pipe: Pipeline, row: dict[str, Any]) -> np.ndarray:
    """The images of a row by the pipeline alone."""
    options = {"policy": CHEAP, **{k: v for k, v in row.items() if k not in ("prompt", "id", "n", "source")}}
    seed = options.pop("seed", seed_of(0, row["id"]))
    found = pipe(row["prompt"], num_images_per_prompt=row.get("n", 1), seed=seed, output_type="np", **options)
    return found.images  # type: ignore[return-value]


def test_every_image_is_the_one_of_the_pipeline_alone(toy_pipe: Pipeline, tmp_path: Path) -> None:
    run = Made(toy_pipe, written(tmp_path / "rows.jsonl", ROWS), tmp_path / "out", settings_of(batch_size=4))
    entries = run()
    assert [(e["id"], e["image"]) for e in entries] == [
        (row["id"], image) for row in ROWS for image in range(row.get("n", 1))
    ]
    assert run.tally.images == len(entries)
    assert run.tally.failures == 0
    found = run.pixels()
    for row in ROWS:
        for image, picture in enumerate(expected(toy_pipe, row)):
            assert np.array_equal(found[row["id"], image], picture), row
    dog = next(e for e in entries if (e["id"], e["image"]) == ("dog", 1))
    assert (dog["seed"], dog["extra"], dog["row"]) == (8, {"source": "kennel"}, 1)
    assert dog["policy"].startswith("ld-pruning")
    assert len(dog["policy_fingerprint"]) == 12
    assert 0 < dog["flops_run"] < dog["flops_full"]
    assert sum(e["flops_run"] for e in entries) == run.tally.flops_run
    assert sum(e["flops_full"] for e in entries) == run.tally.flops_full


def test_shards_have_the_same_bytes_whatever_shares_a_batch(toy_pipe: Pipeline, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [row for row in ROWS if "rng" not in row])
    found = []
    for size in (1, 3, None):
        run = Made(toy_pipe, path, tmp_path / f"out-{size}", settings_of(batch_size=size))
        run([1, 0])
        found.append({p.name: p.read_bytes() for p in run.output.path.rglob("*") if p.suffix in (".tar", ".jsonl")})
    assert len(found[0]) == 4
    assert found[0] == found[1] == found[2]


def test_rows_that_fail_end_nothing(toy_pipe: Pipeline, tmp_path: Path) -> None:
    rows = [
        "{broken",
        ROWS[0],
        {"prompt": "a cat", "id": "size", "size": "17x17"},
        {"prompt": "a cat", "id": "none-such", "policy": "none-such"},
        {"prompt": "a cat", "id": "file", "policy": "mine.yaml"},
        {"prompt": "a cat", "id": "late", "seed": -1},
        ROWS[5],
    ]
    run = Made(toy_pipe, written(tmp_path / "rows.jsonl", rows), tmp_path / "out", settings_of())
    entries = run()
    assert [e["id"] for e in entries if "error" not in e] == ["cat", "rocket"]
    errors = {e["id"]: e["error"] for e in entries if "error" in e}
    assert "rows.jsonl line 1" in errors["0"]
    assert "size must be one of" in errors["size"]
    assert "none-such" in errors["none-such"]
    assert "no policy 'mine.yaml'" in errors["file"]
    assert "seed must be" in errors["late"]
    failed = [json.loads(line) for line in (run.output.path / "failed.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in failed] == ["0", "size", "none-such", "file", "late"]
    assert run.tally.failures == 5
    assert "rows.jsonl line 1" in run.tally.errors[0]


class Faults:
    """Breaks the pipeline for some prompts, as often as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, prompt: str, times: int) -> None:
        self.batches: list[list[str]] = []
        draw = bulk.draw_batch

        def broken(pipe: Pipeline, rows: Any, *arguments: Any) -> Any:
            self.batches.append([row.prompt for row in rows])
            if prompt in self.batches[-1] and sum(prompt in b for b in self.batches) <= times:
                raise error
            return draw(pipe, rows, *arguments)

        monkeypatch.setattr("foveate.bulk.worker.draw_batch", broken)


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyError("a bug"), FoveateError("refused")])
def test_an_image_that_fails_is_tried_again_alone(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prompts = ["a red cat", "two dogs", "the house"]
    path = written(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
    twice = Faults(monkeypatch, error, "two dogs", 2)
    run = Made(toy_pipe, path, tmp_path / "out", settings_of())
    assert [e["prompt"] for e in run()] == prompts
    assert run.tally.failures == 0
    assert twice.batches == [prompts, ["a red cat"], ["two dogs"], ["the house"], ["two dogs"]]
    Faults(monkeypatch, error, "two dogs", 99)
    run = Made(toy_pipe, path, tmp_path / "again", settings_of())
    entries = run()
    assert [("error" in e) for e in entries] == [False, True, False]
    assert entries[1]["attempts"] == 2
    assert str(error.args[0]) in entries[1]["error"]


def test_where_memory_runs_out_batches_become_smaller(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a cat"}] * 4)
    draw, sizes = bulk.draw_batch, []

    def small(pipe: Pipeline, rows: Any, *arguments: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 1:
            raise MemoryError
        return draw(pipe, rows, *arguments)

    monkeypatch.setattr("foveate.bulk.worker.draw_batch", small)
    run = Made(toy_pipe, path, tmp_path / "out", settings_of(shard_size=4))
    assert len(run()) == 4
    assert run.tally.failures == 0
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_images_whose_numbers_break_fail_alone(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": p} for p in ("a red cat", "two dogs", "the house")])
    stream = Pipeline.stream

    def broken(pipe: Pipeline, prompts: list[str], *arguments: Any, **options: Any) -> Any:
        if "two dogs" in prompts:
            raise BrokenNumbersError("logits are NaN", [prompts.index("two dogs")])
        return stream(pipe, prompts, *arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", broken)
    run = Made(toy_pipe, path, tmp_path / "out", settings_of())
    entries = run()
    assert [("error" in e) for e in entries] == [False, True, False]
    assert "logits are NaN" in entries[1]["error"]


def test_a_run_goes_on_where_it_ended(toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": f"a cat {i}"} for i in range(8)])
    whole = Made(toy_pipe, path, tmp_path / "whole", settings_of(batch_size=2, shard_size=4))
    whole()
    draw, drawn, stop = bulk.draw_batch, [], 3

    def ended(pipe: Pipeline, rows: Any, *arguments: Any) -> Any:
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append([row.prompt for row in rows])
        return draw(pipe, rows, *arguments)

    monkeypatch.setattr("foveate.bulk.worker.draw_batch", ended)
    with pytest.raises(KeyboardInterrupt):
        Made(toy_pipe, path, tmp_path / "out", settings_of(batch_size=2, shard_size=4))()
    stop = 99
    again = Made(toy_pipe, path, tmp_path / "out", settings_of(batch_size=2, shard_size=4))
    assert again.left == [1]
    again()
    assert sorted(prompt for batch in drawn for prompt in batch) == [f"a cat {i}" for i in range(8)]
    assert again.tally.images == 8 - 2 * 3
    for name in ("shard-00000000.tar", "shard-00000001.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert threading.active_count() < 10


def test_prompts_are_encoded_once(toy_pipe: Pipeline, tmp_path: Path) -> None:
    read: list[str] = []

    class Counted:
        def encode(self, prompts: list[str]) -> Any:
            read.extend(prompts)
            return toy_pipe.model.text.encode(prompts)

        def num_cut(self, prompt: str) -> int:
            return toy_pipe.model.text.num_cut(prompt)

    pipe = Pipeline(replace(toy_pipe.model, text=Counted()))
    rows = [{"prompt": "a red cat", "policy": p, "seed": 1} for p in ("full", CHEAP, "ld-pruning")] * 2
    path = written(tmp_path / "rows.jsonl", rows)
    Made(pipe, path, tmp_path / "out", settings_of(batch_size=1))()
    assert read.count("a red cat") == 1


def test_psnr_to_the_full_run(toy_pipe: Pipeline, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a red cat"}, {"prompt": "a red cat", "policy": "full"}])
    run = Made(toy_pipe, path, tmp_path / "out", settings_of(psnr_to_full=True))
    one, other = (entry["psnr_to_full"] for entry in run())
    assert 0 < one < 60
    assert other == 100


def test_jpeg_and_parquet(toy_pipe: Pipeline, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS[:2])
    settings = settings_of(encoder=Encoder(format="jpeg", quality=80), shard_format="parquet")
    run = Made(toy_pipe, path, tmp_path / "out", settings)
    entries = run()
    assert {entry["format"] for entry in entries} == {"jpeg"}
    assert all(run.output.content(entry)[:2] == b"\xff\xd8" for entry in entries)


def test_too_many_failures_end_the_run(toy_pipe: Pipeline, tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "size": "17x17"}] * 4
    run = Made(toy_pipe, written(tmp_path / "rows.jsonl", rows), tmp_path / "out", settings_of())
    with pytest.raises(FoveateError, match="2 images failed, .* 1; the first of now: row 0: size must"):
        run(max_failures=1)


def test_parts_cover_all_shards_once() -> None:
    assert sorted(n for k in (1, 2, 3) for n in Part(index=k, count=3).shards(10)) == list(range(10))
    for text in ("0/3", "4/3", "3", "a/b", "-1/2", "1/0"):
        with pytest.raises(FoveateError, match="--shard"):
            Part.parsed(text)


def test_a_seed_follows_from_the_id_alone() -> None:
    assert seed_of(0, "cat") != seed_of(1, "cat") != seed_of(0, "dog")
    assert 0 <= seed_of(0, "cat") < 2**47
    assert seed_of(0, "cat") == 130218782696920


def test_a_forecast_counts_what_the_run_does(toy_pipe: Pipeline, tmp_path: Path) -> None:
    rows = [*[row for row in ROWS if "rng" not in row], "{broken", {"prompt": "a cat", "size": "17x17"}]
    run = Made(toy_pipe, written(tmp_path / "rows.jsonl", rows), tmp_path / "out", settings_of())
    found = forecast(toy_pipe, run.settings, run.source, run.left)
    assert not run.output.published()
    entries = [entry for entry in run() if "error" not in entry]
    assert (found.rows, found.bad_rows, found.images, found.shards) == (8, 2, len(entries), 3)
    assert found.flops_full == pytest.approx(run.tally.flops_full, rel=0.02)
    assert found.flops_run == pytest.approx(run.tally.flops_run, rel=0.05)
    on_disk = sum(path.stat().st_size for path in run.output.path.rglob("*") if path.is_file())
    assert found.disk_bytes == pytest.approx(on_disk, rel=0.5)
    assert len(found.errors) == 2
    assert found.seconds > 0
    assert found.memory_bytes > 0


_MILLION = """
import resource, sys
from foveate.bulk.forecast import planned
from foveate.bulk.rows import Row
from foveate.bulk.settings import RunSettings
from foveate.pipeline.loading import Loading

class Stub:
    name = "stub"

    def read(self, start, stop):
        for index in range(start, stop):
            yield Row(index=index, id=str(index), prompt=f"a cat {index}", options={}, extra={})

settings = RunSettings(loading=Loading(model="toy"), options={"policy": "full"})
planned(settings, Stub(), range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = planned(settings, Stub(), range(1000))
print(plan.rows, plan.images.total(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.soak
def test_a_million_rows_are_planned_in_bounded_memory() -> None:
    ran = subprocess.run([sys.executable, "-c", _MILLION], capture_output=True, text=True, check=True)
    rows, images, kib = map(int, ran.stdout.split())
    assert (rows, images) == (10**6, 10**6)
    assert kib < 10_000


def test_a_worker_says_what_it_did(toy_pipe: Pipeline, tmp_path: Path) -> None:
    run = Made(toy_pipe, written(tmp_path / "rows.jsonl", ROWS), tmp_path / "out", settings_of())
    heard: list[Any] = []
    worker = Worker(pipe=run.pipe, settings=run.settings, source=run.source, output=run.output, listener=heard.append)
    made = worker.generate(0)
    assert (made.images, made.failures, made.more, made.resumed) == (5, 0, 2, 0)
    assert sum(progress.images for progress in heard) == 5
    assert BulkSettings().batch_size is None


def test_an_error_of_the_disk_is_no_failure_of_a_row(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": f"a cat {i}"} for i in range(6)])
    append, calls = Shard.append, []

    def full(shard: Shard, items: Any) -> None:
        calls.append(len(items))
        if len(calls) == 2:
            raise FoveateError("cannot write: No space left on device")
        append(shard, items)

    monkeypatch.setattr(Shard, "append", full)
    made = Made(toy_pipe, path, tmp_path / "out", settings_of(batch_size=1, shard_size=6))
    with pytest.raises(FoveateError, match="No space left"):
        made()
    assert not made.output.published()
    again = Made(toy_pipe, path, tmp_path / "out", settings_of(batch_size=1, shard_size=6))
    assert ["error" in entry for entry in again()] == [False] * 6


def test_an_image_that_cannot_be_encoded_fails_alone(toy_pipe: Pipeline, tmp_path: Path) -> None:
    prompts = ["a cat", "a dog " * 20_000, "rocket"]
    path = written(tmp_path / "rows.jsonl", [{"prompt": prompt} for prompt in prompts])
    made = Made(toy_pipe, path, tmp_path / "out", settings_of(encoder=Encoder(format="jpeg", quality=80)))
    entries = made()
    assert ["error" in entry for entry in entries] == [False, True, False]
    assert "write png or webp" in entries[1]["error"]
    assert (made.tally.images, made.tally.failures) == (2, 1)


def test_a_row_of_one_call_is_whole_after_a_cut(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "two dogs", "id": "dogs", "rng": "reference", "seed": 3, "n": 4}
    path = written(tmp_path / "rows.jsonl", [row])
    with monkeypatch.context() as patched:
        patched.setattr(Shard, "publish", lambda shard: sys.exit("killed"))
        with pytest.raises(SystemExit):
            Made(toy_pipe, path, tmp_path / "out", settings_of())()
    (journal,) = (tmp_path / "out" / ".work").glob("*.journal")
    journal.write_bytes(journal.read_bytes()[: int(0.6 * journal.stat().st_size)])
    made = Made(toy_pipe, path, tmp_path / "out", settings_of())
    made()
    found = made.pixels()
    for image, picture in enumerate(expected(toy_pipe, row)):
        assert np.array_equal(found["dogs", image], picture)


def test_a_sick_machine_ends_the_run_and_no_row_counts_as_failed(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": f"a cat {i}"} for i in range(24)])
    cheap: Any = {"policy": "skip-scales:count=4"}

    def sick(*_: Any) -> Any:
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr("foveate.bulk.worker.draw_batch", sick)
        made = Made(toy_pipe, path, tmp_path / "out", settings_of(options=cheap, shard_size=24))
        with pytest.raises(FoveateError, match="20 images in a row failed, the last one with RuntimeError: CUDA error"):
            made()
    assert not made.output.published()
    made = Made(toy_pipe, path, tmp_path / "out", settings_of(options=cheap, shard_size=24))
    assert not any("error" in entry for entry in made())


def test_what_failed_is_tried_again_where_asked(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": p} for p in ("a red cat", "two dogs", "the house")])
    with monkeypatch.context() as patched:
        Faults(patched, RuntimeError("a fault"), "two dogs", 99)
        assert sum("error" in entry for entry in Made(toy_pipe, path, tmp_path / "out", settings_of())()) == 1
    made = Made(toy_pipe, path, tmp_path / "out", settings_of())
    assert made.left == []
    assert made.output.reopen_failed([0]) == 1
    assert made.left == [0]
    assert [entry["prompt"] for entry in made()] == ["a red cat", "two dogs", "the house"]
    assert made.tally.images == 1
    assert made.output.num_failed() == 0


def test_a_warning_of_one_image_is_in_no_other_file(toy_pipe: Pipeline, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": p} for p in ("a red cat", "two dogs", "the house", "rocket")])
    found = []
    for size in (1, 4):
        options: Any = {"policy": "ld-pruning"}
        made = Made(toy_pipe, path, tmp_path / f"{size}", settings_of(options=options, batch_size=size, shard_size=4))
        found.append([(entry["sha256"], entry["warnings"]) for entry in made()])
    assert found[0] == found[1]
