"""Rows to images in batches: nothing listed ahead, the same bits in every batch, memory asked before anything runs."""

import logging
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foveate.core.errors import BrokenNumbersError, FoveateError
from foveate.core.warnings import CallWarning
from foveate.engine.report import Report
from foveate.families import available
from foveate.families.available import available_bytes
from foveate.families.memory import MemoryNeed, largest_batch, memory_need, resident_bytes
from foveate.families.published import PUBLISHED
from foveate.families.residency import Residency
from foveate.pipeline import bulk
from foveate.pipeline.bulk import LARGEST_BATCH, BulkSettings, DrawnBatch, ImageRow, add_reports, draw_rows, rows_of
from foveate.pipeline.call import MAX_SEED
from foveate.pipeline.pipeline import Pipeline, stack_uint8
from foveate.policies.full import Full
from foveate.policies.registry import load_policy

PROMPTS = ["a red cat", "a big dog", "the house"]
CHEAP: dict[str, Any] = {"policy": "skip-scales:count=3"}

SetMemory = Callable[[int | None], None]


@pytest.fixture
def set_memory(monkeypatch: pytest.MonkeyPatch) -> SetMemory:
    """Says how much memory is left for drawing; the toy's decoder would take more than a dozen of its images."""
    need = bulk.memory_need
    monkeypatch.setattr(bulk, "memory_need", lambda *args, **kwargs: replace(need(*args, **kwargs), decoder=0))
    return lambda size: monkeypatch.setattr(bulk, "available_bytes", lambda device: size)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every call of a pipeline."""
    seen: list[list[str]] = []
    stream = Pipeline.stream

    def noted(pipe: Pipeline, prompts: list[str], *arguments: Any, **options: Any) -> Any:
        seen.append(prompts)
        return stream(pipe, prompts, *arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", noted)
    return seen


def rows(number: int) -> Iterator[ImageRow]:
    return (ImageRow(prompt=PROMPTS[i % 3], seed=7 + i) for i in range(number))


def drawn(pipe: Pipeline, source: Any, how: BulkSettings | None = None, **options: Any) -> list[DrawnBatch]:
    return list(draw_rows(pipe, source, how or BulkSettings(), **(options or CHEAP)))


def pixels(batches: list[DrawnBatch]) -> np.ndarray:
    return stack_uint8([image for batch in batches for image in batch.images])


def one_image(pipe: Pipeline, policy: str = "skip-scales:count=3") -> int:
    return memory_need(pipe.model.spec, torch.float32, load_policy(policy)).drawing


def test_an_image_has_the_same_bits_in_every_batch(toy_pipe: Pipeline) -> None:
    options: dict[str, Any] = {"policy": "ld-pruning"}
    found = {size: drawn(toy_pipe, rows(4), BulkSettings(batch_size=size), **options) for size in (1, 3, 4)}
    assert [len(batch.images) for batch in found[3]] == [3, 1]
    assert np.array_equal(pixels(found[1]), pixels(found[4]))
    assert np.array_equal(pixels(found[3]), pixels(found[4]))
    prompts, seeds = [PROMPTS[i % 3] for i in range(4)], [7, 8, 9, 10]
    one_call = toy_pipe(prompts, seed=seeds, output_type="np", **options)
    assert np.array_equal(pixels(found[1]), one_call.images)  # type: ignore[arg-type]
    assert [row for batch in found[3] for row in batch.rows] == list(rows(4))


def test_rows_are_those_of_a_call(toy_pipe: Pipeline) -> None:
    options: dict[str, Any] = {
        "num_images_per_prompt": 2,
        "seed": [3, 9],
        "negative_prompt": ["green", "blue"],
        **CHEAP,
    }
    found = list(rows_of(PROMPTS[:2], toy_pipe.model.spec, **options))
    assert found == [
        ImageRow(prompt=prompt, seed=seed, negative_prompt=negative)
        for prompt, negative, seeds in (("a red cat", "green", (3, 4)), ("a big dog", "blue", (9, 10)))
        for seed in seeds
    ]
    together = toy_pipe(PROMPTS[:2], output_type="np", **options)
    assert np.array_equal(pixels(drawn(toy_pipe, found, BulkSettings(batch_size=3))), together.images)  # type: ignore
    one, other = (next(rows_of("a cat", toy_pipe.model.spec)).seed for _ in range(2))
    assert one != other


def test_nothing_is_listed_ahead(toy_pipe: Pipeline, calls: list[list[str]]) -> None:
    tracemalloc.start()
    found = rows_of(PROMPTS, toy_pipe.model.spec, num_images_per_prompt=10**12, seed=1)
    first = list(islice(found, 3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert first == [ImageRow(prompt="a red cat", seed=seed) for seed in (1, 2, 3)]
    read: list[int] = []

    def endless() -> Iterator[ImageRow]:
        for i in count():
            read.append(i)
            yield ImageRow(prompt="a cat", seed=i)

    batches = draw_rows(toy_pipe, endless(), BulkSettings(batch_size=2), **CHEAP)
    assert (read, calls) == ([0], [])
    assert next(batches).rows == (ImageRow(prompt="a cat", seed=0), ImageRow(prompt="a cat", seed=1))
    assert (read, calls) == ([0, 1], [["a cat"] * 2])
    batches.close()


@pytest.mark.parametrize("number", [10**19, 10**30, MAX_SEED])
def test_seeds_that_do_not_exist_are_refused_at_once(toy_pipe: Pipeline, number: int) -> None:
    with pytest.raises(FoveateError, match=f"{number} images from seed 1 on need seeds of 2\\^63 and more"):
        rows_of(PROMPTS, toy_pipe.model.spec, num_images_per_prompt=number, seed=1)


def test_rows_say_their_own(toy_pipe: Pipeline) -> None:
    for name, value in (("seed", 1), ("num_images_per_prompt", 2), ("negative_prompt", "a"), ("generator", None)):
        with pytest.raises(FoveateError, match=f"rows say {name} themselves"):
            draw_rows(toy_pipe, rows(1), BulkSettings(), **{name: value})  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="leave generator out"):
        rows_of("a", toy_pipe.model.spec, rng="reference", generator=torch.Generator())
    with pytest.raises(FoveateError, match="rows come as PIL images; leave output_type out"):
        draw_rows(toy_pipe, rows(1), BulkSettings(), output_type="np")  # type: ignore[call-arg]
    with pytest.raises(FoveateError, match="no rows to generate"):
        draw_rows(toy_pipe, iter(()), BulkSettings())
    with pytest.raises(FoveateError, match="1 image or more, got 0"):
        BulkSettings(batch_size=0)


def test_what_no_row_can_be_drawn_with_is_said_before_any_is(toy_pipe: Pipeline, calls: list[list[str]]) -> None:
    for options, message in (
        ({"temperature": 0}, "temperature must be"),
        ({"policy": "skip-scales:count=9"}, "count must be less than"),
        ({"width": 100, "height": 100}, "size must be one of"),
    ):
        with pytest.raises(FoveateError, match=message):
            draw_rows(toy_pipe, rows(2), BulkSettings(), **options)
    assert calls == []


def test_memory_decides_how_large_a_batch_is(
    toy_pipe: Pipeline, set_memory: SetMemory, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = one_image(toy_pipe)
    set_memory(int(3.5 * one / 0.9))
    assert [len(batch.rows) for batch in drawn(toy_pipe, rows(7))] == [3, 3, 1]
    assert [len(prompts) for prompts in calls] == [3, 3, 1]
    assert LARGEST_BATCH == 16
    monkeypatch.setattr(bulk, "LARGEST_BATCH", 4)
    for size in (None, 10**15):
        set_memory(size)
        batches = draw_rows(toy_pipe, rows(6), BulkSettings(), **CHEAP)
        assert len(next(batches).rows) == 4
        batches.close()


def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(
    toy_pipe: Pipeline, set_memory: SetMemory, calls: list[list[str]]
) -> None:
    one = one_image(toy_pipe)
    set_memory(int(3.5 * one / 0.9))
    for size in (4, 10**12):
        with pytest.raises(FoveateError, match=rf"a batch of {size} images .* the largest batch that fits is 3$"):
            draw_rows(toy_pipe, rows(2), BulkSettings(batch_size=size), **CHEAP)
    assert [len(batch.rows) for batch in drawn(toy_pipe, rows(3), BulkSettings(batch_size=3))] == [3]
    set_memory(int(0.5 * one))
    for size in (None, 1, 2):
        with pytest.raises(FoveateError, match="not even one image fits .* 256x256 .* choose a smaller size or model"):
            draw_rows(toy_pipe, rows(2), BulkSettings(batch_size=size), **CHEAP)
    assert len(calls) == 1
    # Less runs without guidance, so more fits.
    set_memory(int(1.5 * one / 0.9))
    with pytest.raises(FoveateError, match="the largest batch that fits is 1"):
        draw_rows(toy_pipe, rows(2), BulkSettings(batch_size=2), **CHEAP)
    draw_rows(toy_pipe, rows(2), BulkSettings(batch_size=2), guidance_scale=1.0, **CHEAP)


def test_the_published_order_is_one_batch_or_none(
    toy_pipe: Pipeline, set_memory: SetMemory, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"rng": "reference", **CHEAP}
    spec = toy_pipe.model.spec

    def asked(number: int) -> Iterator[ImageRow]:
        return rows_of("a cat", spec, num_images_per_prompt=number, seed=5, **options)

    monkeypatch.setattr(bulk, "LARGEST_BATCH", 2)
    (batch,) = drawn(toy_pipe, asked(3), **options)
    call = toy_pipe("a cat", num_images_per_prompt=3, seed=5, output_type="np", **options)
    assert np.array_equal(pixels([batch]), call.images)  # type: ignore[arg-type]
    set_memory(int(3.5 * one_image(toy_pipe) / 0.9))
    for how in (BulkSettings(), BulkSettings(total=10**12), BulkSettings(batch_size=4)):
        with pytest.raises(
            FoveateError, match="all images as one batch, .* do not fit .* largest batch that fits is 3"
        ):
            draw_rows(toy_pipe, asked(10**12), how, **options)
    with pytest.raises(FoveateError, match="generates all 3 images as one batch; leave the batch size out"):
        draw_rows(toy_pipe, asked(3), BulkSettings(batch_size=2), **options)
    with pytest.raises(FoveateError, match="takes one seed for all rows"):
        draw_rows(toy_pipe, rows(2), BulkSettings(), **options)
    assert len(calls) == 1


def test_rows_with_and_without_a_negative_prompt_share_no_batch(toy_pipe: Pipeline) -> None:
    texts = [None, "green", "blue", None]
    mixed = [ImageRow(prompt="a cat", seed=i, negative_prompt=text) for i, text in enumerate(texts)]
    found = drawn(toy_pipe, mixed, BulkSettings(batch_size=4))
    assert [len(batch.rows) for batch in found] == [1, 2, 1]
    alone = [drawn(toy_pipe, [row]) for row in mixed]
    assert np.array_equal(pixels(found), pixels([batch for (batch,) in alone]))
    assert [batch.output.row_config(0)["negative_prompt"] for batch in found] == [None, "green", None]


def test_previews_come_with_their_batch(toy_pipe: Pipeline) -> None:
    (batch,) = drawn(toy_pipe, rows(2), BulkSettings(previews=3))
    assert [len(images) for images in batch.previews] == [2, 2]
    last = drawn(toy_pipe, rows(2), BulkSettings(previews=bulk.ALL_SCALES))[0]
    assert len(last.previews) == 6
    assert np.array_equal(stack_uint8(last.previews[-1]), stack_uint8(batch.previews[-1]))


def test_what_was_drawn_before_an_error_is_there(toy_pipe: Pipeline) -> None:
    source = [*rows(2), ImageRow(prompt=" ", seed=1)]
    batches = draw_rows(toy_pipe, source, BulkSettings(batch_size=2), **CHEAP)
    assert len(next(batches).images) == 2
    with pytest.raises(FoveateError, match="prompt must not be empty"):
        next(batches)


def test_a_broken_image_takes_no_other_one_with_it(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Pipeline.stream

    def breaking(pipe: Pipeline, prompts: list[str], *arguments: Any, **options: Any) -> Any:
        broken = [i for i, prompt in enumerate(prompts) if prompt == "a big dog"]
        if broken:
            raise BrokenNumbersError("NaN", broken)
        return stream(pipe, prompts, *arguments, **options)

    whole = drawn(toy_pipe, rows(8), BulkSettings(batch_size=4))
    monkeypatch.setattr(Pipeline, "stream", breaking)
    batches = draw_rows(toy_pipe, rows(8), BulkSettings(batch_size=4), **CHEAP)
    # Rows 1, 4 and 7 are dogs; the first batch loses one and is the last one.
    first = next(batches)
    assert [row.seed for row in first.rows] == [7, 9, 10]
    assert np.array_equal(pixels([first]), pixels(whole)[[0, 2, 3]])
    with pytest.raises(BrokenNumbersError, match="^image 1: NaN$"):
        next(batches)
    with pytest.raises(BrokenNumbersError, match="^image 2: NaN$"):
        drawn(
            toy_pipe, [*islice(rows(8), 1), *islice(rows(8), 2, 3), *islice(rows(8), 1, 2)], BulkSettings(batch_size=2)
        )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_counts_images_and_says_how_long(
    toy_pipe: Pipeline, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    quiet = None if is_terminal else True
    shown = BulkSettings(batch_size=2, total=5, hides_progress=False if is_terminal else quiet)
    toy_pipe.set_progress_bar_config(disable=True)
    try:
        capsys.readouterr()
        drawn(toy_pipe, rows(5), shown)
        text = capsys.readouterr().err
    finally:
        toy_pipe.set_progress_bar_config(disable=None)
    if not is_terminal:
        assert text == ""
        return
    # A batch that takes less than the bar's tenth of a second is not shown.
    assert re.search(r"[24]/5 \[\d\d:\d\d<\d\d:\d\d, .*image", text)


def test_a_warning_is_said_once_for_all_batches(toy_pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="foveate"):
        found = drawn(toy_pipe, rows(4), BulkSettings(batch_size=1), aspect_ratio="4:3", **CHEAP)
    assert [record.getMessage() for record in caplog.records if "was trained on" in record.getMessage()] != []
    assert len([r for r in caplog.records if "was trained on" in r.getMessage()]) == 1
    # Each batch still carries it, and the sum has it once.
    assert all(batch.output.report.warnings for batch in found)
    total = add_reports(found[0].output.report, found[1].output.report)
    assert total.warnings == found[0].output.report.warnings
    assert logging.getLogger("foveate").filters == []


def test_reports_add_up(toy_pipe: Pipeline) -> None:
    options: dict[str, Any] = {"policy": "ld-pruning"}
    batches = drawn(toy_pipe, rows(3), BulkSettings(batch_size=2), **options)
    (whole,) = drawn(toy_pipe, rows(3), **options)
    first, second = (batch.output.report for batch in batches)
    total, together = add_reports(first, second), whole.output.report
    names = ("flops_run", "flops_full", "tokens_run", "tokens_full", "token_blocks_run", "token_blocks_full")
    assert [getattr(total, name) for name in names] == [getattr(together, name) for name in names]
    assert total.kv_bytes_peak == first.kv_bytes_peak > second.kv_bytes_peak
    assert total.ms.decoder == first.ms.decoder + second.ms.decoder
    assert total.ms.total == first.ms.total + second.ms.total
    assert 0 < total.flops_ratio < 1

    def warned(report: Report, *warnings: CallWarning) -> Report:
        return replace(report, warnings=warnings, unfired=("keep fewer tokens",) if warnings else ())

    idle = CallWarning(code="policy_without_effect", message="no effect")
    cut = CallWarning(code="prompt_cut", message="cut")
    assert add_reports(warned(first, idle, cut), warned(second, idle)).warnings == (idle, cut)
    # A saving that happened in one batch did happen.
    assert add_reports(warned(first, idle, cut), warned(second)).warnings == (cut,)
    assert add_reports(warned(first, idle), warned(second)).unfired == ()


@pytest.mark.parametrize(
    ("name", "policy", "residency"),
    [
        ("infinity-2b", "depthvar", Residency()),
        ("var-d16", "full", Residency(offload=True)),
        ("switti-1024", "cached-guidance", Residency(release_text_encoder=True)),
    ],
)
def test_the_largest_batch_is_the_last_one_below_the_limit(name: str, policy: str, residency: Residency) -> None:
    spec = PUBLISHED[name].spec

    def need(number: int = 1) -> MemoryNeed:
        return memory_need(spec, torch.bfloat16, load_policy(policy), number, residency=residency, quantization=None)

    resident = resident_bytes(spec, torch.bfloat16, None, residency)
    one = need()
    for room in (one.peak - 1, one.peak, 3 * one.peak):
        largest = largest_batch(one, resident, room - resident)
        assert largest == 0 or need(largest).peak <= room
        assert need(largest + 1).peak > room


def test_resident_weights_are_those_that_stay() -> None:
    spec = PUBLISHED["infinity-125m"].spec
    need = memory_need(spec, torch.float32, Full())
    networks = need.transformer + need.autoencoder
    for residency, expected in (
        (Residency(), networks + need.text_encoder),
        (Residency(release_text_encoder=True), networks),
        (Residency(offload=True), 0),
    ):
        assert resident_bytes(spec, torch.float32, None, residency) == expected


def test_without_guidance_half_the_rows_run(toy_pipe: Pipeline) -> None:
    spec = toy_pipe.model.spec
    guided, alone = (memory_need(spec, torch.float32, Full(), is_guided=is_guided) for is_guided in (True, False))
    assert 2 * alone.drawing == guided.drawing
    report = toy_pipe("a cat", seed=1, guidance_scale=1, output_type="latent").report
    assert alone.kv == report.kv_bytes_bound


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """An empty system, whose files a test writes."""
    monkeypatch.setattr(available, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(available, "_GROUPS", tmp_path / "cgroup")

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_memory_is_the_least_of_what_the_system_would_give(linux: Callable[[str, str], None]) -> None:
    cpu = torch.device("cpu")
    assert available_bytes(cpu) is None
    linux("proc/meminfo", "MemTotal: 99 kB\nMemAvailable:      9000 kB\n")
    assert available_bytes(cpu) == 9000 * 1024
    # Version 2: the group has no limit of its own, the one above has.
    linux("proc/self/cgroup", "0::/a/b\n")
    linux("cgroup/a/b/memory.max", "max\n")
    linux("cgroup/a/b/memory.current", "10\n")
    assert available_bytes(cpu) == 9000 * 1024
    linux("cgroup/a/memory.max", "5000\n")
    linux("cgroup/a/memory.current", "3000\n")
    linux("cgroup/a/memory.stat", "anon 1\ninactive_file 500\n")
    assert available_bytes(cpu) == 2500
    # Version 1, seen from inside of a container: only the root of the groups is there.
    linux("proc/self/cgroup", "3:cpu:/x\n4:memory:/docker/x\n0::/\n")
    assert available_bytes(cpu) == 9000 * 1024
    linux("cgroup/memory/memory.limit_in_bytes", "4000\n")
    linux("cgroup/memory/memory.usage_in_bytes", "4500\n")
    assert available_bytes(cpu) == 0
    linux("cgroup/memory/memory.stat", "total_inactive_file 700\n")
    assert available_bytes(cpu) == 200


def test_a_limit_of_address_space_counts(linux: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import resource  # noqa: PLC0415 - Windows has none

    linux("proc/meminfo", "MemAvailable: 9000000 kB\n")
    linux("proc/self/statm", "100 5 5 5 0 5 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**6, 10**6))
    monkeypatch.setattr(available.os, "sysconf", lambda name: 4096)
    assert available_bytes(torch.device("cpu")) == 10**6 - 100 * 4096


def test_a_gpu_has_what_the_driver_and_torch_hold_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000),
        memory_reserved=lambda device: 50,
        memory_allocated=lambda device: 20,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert available_bytes(torch.device("cuda")) == 130
