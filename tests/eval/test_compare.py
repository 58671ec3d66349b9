"""A comparison on the toy: its figures, its bounds and its page."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.eval.compare import ComparisonReport, compare, read_prompts
from foveate.eval.page import page_data
from foveate.pipeline.pipeline import Pipeline
from foveate.viz.metrics import Axis
from foveate.viz.page_payload import known_metrics


@pytest.fixture(scope="module")
def report(toy_pipe: Pipeline) -> ComparisonReport:
    return compare(toy_pipe, "skip-scales:count=1", ["a red cat", "two dogs"], seeds=2, runs=1, batch_size=2)


def test_json_has_the_contract_keys(report: ComparisonReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert {"n", "psnr", "ssim", "identical", "yardstick_psnr", "speedup", "flops_ratio"} <= set(data)
    assert set(data["speedup"]) == {"transformer", "decoder", "end_to_end"}
    assert data["n"] == 4
    assert data["flops_ratio"] < 0.6
    assert data["policy"] == "skip-scales"
    assert [row["seed"] for row in data["images"]] == [0, 1, 0, 1]


def test_check(report: ComparisonReport) -> None:
    assert report.check("flops_ratio < 0.6")
    assert not report.check("psnr.mean >= 99.5")
    with pytest.raises(FoveateError, match=r"there are psnr\.mean, psnr\.p10"):
        report.check("beauty >= 1")
    with pytest.raises(FoveateError, match="is written like"):
        report.check("psnr.mean is high")


def test_page_needs_nothing_beside_itself(report: ComparisonReport, tmp_path: Path) -> None:
    page = report.to_html(tmp_path / "report.html", "compare this").read_text(encoding="utf-8")
    assert "two dogs" in page
    assert "compare this" in page


def test_the_page_says_how_many_images_it_leaves_out(report: ComparisonReport) -> None:
    few = replace(report, policies=(replace(report.policies[0], shown=report.policies[0].shown[:3]),))
    assert "The page holds the worst 3 of 4 pairs." in few.page()
    assert "The page holds" not in report.page()


class Darkness:
    """A judge whose scores are errors."""

    name, is_error = "darkness", True

    def score(self, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.asarray(255.0 - images.mean(axis=(1, 2, 3)))


def test_the_page_knows_which_way_a_figure_is_good(toy_pipe: Pipeline) -> None:
    found = compare(toy_pipe, "skip-scales", ["a red cat"], runs=1, judges=[Darkness()])
    data = page_data(found, "compare this")
    known = {metric.name: metric for metric in known_metrics(data)}
    assert (known["darkness.max"].is_high_good, known["darkness.max"].axis) == (False, Axis.FIDELITY)
    assert data.metric("darkness").is_high_good is False
    time = known["transformer_ms.median"]
    assert (time.label, time.is_high_good, time.axis) == ("transformer time", False, Axis.COST)


def test_same_policy_is_identical(toy_pipe: Pipeline) -> None:
    report = compare(toy_pipe, "full", ["a red cat"], runs=1)
    assert report.fidelity.identical == report.fidelity.num_images == 1
    assert report.flops_ratio == 1.0
    assert report.check("psnr.min == 100")
    assert report.yardstick_psnr < 60


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n two dogs \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "two dogs"]
    with pytest.raises(FoveateError, match="at least one prompt"):
        read_prompts([])
    with pytest.raises(FoveateError, match="cannot read prompts"):
        read_prompts("a red cat")


def test_missing_extra_is_said_before_anything_is_drawn(toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.eval.compare.find_spec", lambda name: None)
    monkeypatch.setattr(Pipeline, "__call__", None)
    with pytest.raises(FoveateError, match=r"needs flip-evaluator, .*foveate\[eval\]"):
        compare(toy_pipe, "full", ["a red cat"])
