"""Whole measurements on the toy: turns, early refusals, stops, and what a report, page and plot hold."""

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.bench.calibrate import CALIBRATION, profile
from foveate.bench.page import main_table, markdown, scale_table
from foveate.bench.plot import draw
from foveate.bench.report import BenchReport
from foveate.bench.rounds import Stop
from foveate.bench.run import BenchPlan, run_bench
from foveate.bench.workload import DEFAULT_PROMPT, Workload, default_prompt
from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.profile import Profile, features_of
from foveate.policies.full import Full
from foveate.policies.registry import load_policy
from tests.bench.conftest import make_plan

KINDS = ("latency", "throughput", "memory")


@pytest.fixture
def calls(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """What the pipeline was asked for: prompts, seeds and policy of every call, in order."""
    seen: list[tuple[Any, Any, Any]] = []
    generate = Pipeline.__call__

    def spy(self: Pipeline, prompts: Any, **options: Any) -> Any:
        seen.append((prompts, options["seed"], options["policy"].spec))
        return generate(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "__call__", spy)
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))
    return seen


def test_policies_alternate_over_the_same_draws(toy_pipe: Pipeline, calls: list[tuple[Any, Any, Any]]) -> None:
    report = run_bench(
        toy_pipe, make_plan("latency", "skip-scales:count=4", "skip-scales:count=5"), hides_progress=True
    )
    assert [spec for _, _, spec in calls] == ["skip-scales:count=4", "skip-scales:count=5"] * 3
    drawn = [call[:2] for call in calls]
    assert drawn[0::2] == drawn[1::2] == [(["a red cat"], [0]), (["two dogs"], [1]), (["a red cat"], [2])]
    assert report.cases[0].rounds == 2
    assert report.stopped is None
    assert "1 warm-up round" in report.excluded[0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan("latency", "full", "skip-scales:count=9"), "count must be less than"),
        (
            BenchPlan(
                kind="latency",
                policies=(Full(),),
                workloads=(Workload(batch=1), Workload(batch=1, size=(100, 100))),
                runs=1,
                warmup=0,
                command="",
            ),
            "size must be one of",
        ),
        (
            BenchPlan(
                kind="memory",
                policies=(Full(),),
                workloads=(Workload(batch=2, seed=2**63 - 6),),
                runs=2,
                warmup=1,
                command="",
            ),
            "seed must be",
        ),
    ],
)
def test_refuses_before_anything_is_drawn(
    toy_pipe: Pipeline, calls: list[tuple[Any, Any, Any]], plan: BenchPlan, message: str
) -> None:
    with pytest.raises(FoveateError, match=message):
        run_bench(toy_pipe, plan, hides_progress=True)
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kind": "speed"}, "one of latency"), ({"runs": 0}, "runs must be 1"), ({"policies": ()}, "at least one policy")],
)
def test_plans_check_themselves(changes: dict[str, Any], message: str) -> None:
    given = {"kind": "latency", "policies": (Full(),), "workloads": (Workload(batch=1),), "runs": 1, "warmup": 0}
    with pytest.raises(FoveateError, match=message):
        BenchPlan(**{**given, **changes}, command="")


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Makes a call of the pipeline fail, counted from 0."""
    generate, made = Pipeline.__call__, []

    def fail(self: Pipeline, prompts: Any, **options: Any) -> Any:
        made.append(prompts)
        if len(made) > call:
            raise error
        return generate(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "__call__", fail)
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))


def test_an_interrupt_keeps_complete_rounds(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two calls warm up and two are the first round of batch 1; the second round is cut off, batch 2 never begins.
    stop_at(monkeypatch, 5, KeyboardInterrupt())
    plan = make_plan("throughput", "skip-scales:count=4", "skip-scales:count=5", batches=(1, 2))
    report = run_bench(toy_pipe, plan, hides_progress=True)
    assert report.stopped is Stop.INTERRUPTED
    assert [(case.batch, case.rounds) for case in report.cases] == [(1, 1)]
    assert "stopped: interrupted" in markdown(report, None)


def test_nothing_measured_is_nothing_reported(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_bench(toy_pipe, make_plan("latency", "full"), hides_progress=True)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 9 bytes from file <x.pth>: Cannot allocate memory (12)"),
        MemoryError("no memory for packed keys and values"),
    ):
        stop_at(monkeypatch, 0, error)
        with pytest.raises(FoveateError, match="smaller --size or --batch"):
            run_bench(toy_pipe, make_plan("latency", "full"), hides_progress=True)
    stop_at(monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_bench(toy_pipe, make_plan("latency", "full"), hides_progress=True)


def test_a_warning_is_said_once(
    toy_pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))
    workload = Workload(batch=1, prompts=("a cat",), aspect_ratio="2:1")
    plan = BenchPlan(kind="latency", policies=(Full(),), workloads=(workload,), runs=2, warmup=0, command="")
    with caplog.at_level(logging.WARNING, "foveate"):
        run_bench(toy_pipe, plan, hides_progress=True)
    assert [record.getMessage() for record in caplog.records if "was trained on" in record.getMessage()] == [
        "toy was trained on 1:1 at 0.06M; 2:1 at 0.06M is outside of that and may look wrong"
    ]
    assert logging.getLogger("foveate").filters == []


@pytest.mark.parametrize("kind", KINDS)
def test_json_and_csv_hold_every_figure(toy_report: Callable[[str], BenchReport], kind: str) -> None:
    report = toy_report(kind)
    data = json.loads(json.dumps(report.to_json()))
    assert data["bench"] == kind
    assert data["machine"]["versions"]["torch"]
    assert data["settings"]["warmup"] == 1
    case = data["cases"][0]
    assert (case["width"], case["height"], case["tokens"], case["num_scales"]) == (256, 256, 521, 7)
    assert [policy["policy"] for policy in case["policies"]] == ["full", "skip-scales:count=3", "drop-branch:count=1"]
    group = "bytes" if kind == "memory" else "ms"
    for policy in case["policies"]:
        assert all(spread["p10"] <= spread["median"] <= spread["p90"] for spread in policy[group].values())
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len({(row["batch"], row["side"], row["figure"]) for row in rows}) == len(rows)
    numbers = sum(len(e.figures) + len(e.numbers) + len(e.scales) for c in report.cases for e in c.entries)
    assert len(rows) == numbers
    assert {row["policy"] for row in rows} == {policy["policy"] for policy in case["policies"]}


def test_latency_compares_with_the_first_policy(toy_report: Callable[[str], BenchReport]) -> None:
    full, skip, drop = toy_report("latency").to_json()["cases"][0]["policies"]
    assert "speedup" not in full
    assert skip["speedup"]["by_flops"]["median"] == pytest.approx(
        full["flops"]["run"]["median"] / skip["flops"]["run"]["median"], rel=0.01
    )
    assert drop["speedup"]["by_flops"]["median"] > 1
    assert full["peak_share"]["median"] > 0
    assert [scale["grid"] for scale in full["scales"]][:3] == [[1, 1], [2, 2], [4, 4]]
    assert [scale["flops"] > 0 for scale in skip["scales"]] == [True] * 4 + [False] * 3
    assert sum(scale["flops"] for scale in drop["scales"]) == drop["flops"]["run"]["median"]
    columns, rows = scale_table(toy_report("latency").cases[0])
    assert columns[2:] == ("full", "skip-scales:count=3", "drop-branch:count=1")
    assert [row[1] for row in rows][-1] == "16x16"


def test_throughput_over_batches(toy_report: Callable[[str], BenchReport]) -> None:
    report = toy_report("throughput")
    assert [case.batch for case in report.cases] == [1, 2]
    alone, pair = (case.entries[0] for case in report.cases)
    assert alone.numbers["single_stream_ms.p50"] is not None
    assert alone.numbers["single_stream_ms.p90"] is None
    assert "single_stream_ms.p50" not in pair.numbers
    rate = pair.numbers["images_per_s"]
    assert rate is not None
    # Both counted rounds drew two images.
    assert 1e3 * 2 / pair.figures["ms.total"].p90 * 0.5 < rate < 1e3 * 2 / pair.figures["ms.total"].p10 * 2
    assert "p90 needs 10" in markdown(report, None)


@pytest.mark.parametrize("kind", KINDS)
def test_page_and_plot(toy_report: Callable[[str], BenchReport], kind: str, tmp_path: Path) -> None:
    report = toy_report(kind)
    page = markdown(report, "bench.svg")
    columns, rows = main_table(report)
    assert all(len(row) == len(columns) for row in rows)
    for part in ("warm-up", "torch ", "```text\nfoveate bench", "(bench.svg)", "Not part of any figure", *columns):
        assert part in page
    draw(report, tmp_path / "a.svg")
    draw(report, tmp_path / "b.svg")
    picture = (tmp_path / "a.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    assert picture == (tmp_path / "b.svg").read_bytes()
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_composed_policy_does_not_break_the_table(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))
    plan = make_plan("latency", "skip-scales:count=4|drop-branch:count=1", runs=1, warmup=0)
    page = markdown(run_bench(toy_pipe, plan, hides_progress=True), None)
    assert "skip-scales:count=4\\|drop-branch:count=1" in page
    assert "no warm-up round" in page


def test_columns_without_a_figure_are_left_out(
    toy_report: Callable[[str], BenchReport], toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "efficiency" in main_table(toy_report("latency"))[0]
    monkeypatch.setattr("foveate.bench.run.MATMUL_SIZES", (32,))
    columns, rows = main_table(run_bench(toy_pipe, make_plan("latency", "full", runs=1, warmup=0), hides_progress=True))
    assert columns[-2:] == ("decoder", "of peak")
    assert all(len(row) == len(columns) for row in rows)


def test_profile(toy_report: Callable[[str], BenchReport]) -> None:
    data = json.loads(json.dumps(profile(toy_report("calibrate"), 1e9)))
    assert data["weight_bytes_per_s"] == 1e9
    assert data["matmul_peak"]["flops_per_s"] > 0
    (size,) = data["sizes"]
    assert (size["width"], size["batch"], len(size["scales"])) == (256, 1, 7)
    # Two branches and three blocks of the toy.
    assert [scale["token_blocks"] for scale in size["scales"]] == [6 * n * n for n in (1, 2, 4, 6, 8, 12, 16)]
    for scale in size["scales"]:
        assert scale["ms_per_token_block"] == pytest.approx(scale["ms"]["median"] / scale["token_blocks"])
    assert [scale["blocks"] for scale in size["scales"]] == [3] * 7


def test_profile_says_what_the_time_of_a_scale_is_made_of(toy_report: Callable[[str], BenchReport]) -> None:
    report = toy_report("calibrate")
    data = json.loads(json.dumps(profile(report, 1e9)))
    found, (case,) = Profile.from_json(data["fit"]), report.cases
    assert found.decoder_ms == ((256 * 256, case.entries[0].figures["ms.decoder"].median),)
    assert found.headroom >= 1
    assert [point["policy"] for point in data["points"]] == [load_policy(spec).spec for spec in CALIBRATION]
    for point, entry in zip(data["points"], case.entries, strict=True):
        assert point["transformer_ms"] == entry.figures["ms.transformer"].median
        predicted = sum(
            sum(a * b for a, b in zip(found.ms, row, strict=True))
            for row in (features_of(s.scale, blocks=s.blocks, token_blocks=s.token_blocks, flops=s.flops)
                        for s in entry.scales)
        )  # fmt: skip
        assert point["predicted_ms"] == pytest.approx(predicted)
        # Times of a toy on a busy machine say little; the order of magnitude is right.
        assert 0.2 < point["predicted_ms"] / point["transformer_ms"] < 5


def test_default_prompt_is_a_text_where_texts_are_drawn(toy_pipe: Pipeline) -> None:
    assert default_prompt(toy_pipe) == DEFAULT_PROMPT
