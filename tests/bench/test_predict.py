"""The prediction for a GPU: its parts by hand, and the totals of the page are what the script prints."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from predict_gpu import Gpu, Prediction, main, predict

ROOT = Path(__file__).parents[2]
SLOW = Gpu(flops_per_s=1e12, bytes_per_s=1e12, launch_s=0.0, node_s=0.0)


def test_first_scale_reads_every_weight_once_and_the_last_one_every_key():
    """Infinity-2B: blocks of 14 C^2 weights and a few vectors; K and V of both rows, of all tokens and of the text."""
    found = predict("infinity-2b", "1M", 1, 32, "kernels", SLOW)
    width, blocks, tokens = 2048, 32, 10521
    matrices = 14 * width**2 * blocks + 64 * width
    first = 2 * (matrices + 2 * 2 * 33 * width * blocks)
    assert found[0].memory_s * 1e12 == pytest.approx(first, rel=2e-3)
    grown = (found[-1].memory_s - found[0].memory_s) * 1e12
    assert grown == pytest.approx(2 * 2 * 2 * (tokens - 1) * width * blocks)
    assert found[-1].between_s * 1e12 == pytest.approx(80 * 2 * 4096 * width * blocks)


def test_time_is_the_larger_ceiling_plus_what_lies_between_and_never_below_the_launches():
    part = Prediction(scale=0, side="1x1", products_s=2.0, memory_s=1.0, between_s=0.5, launches_s=0.1, nodes_s=0.1)
    assert (part.seconds, part.bound, part.replayed_s) == (2.5, "products", 2.5)
    launching = replace(part, memory_s=3.0, launches_s=9.0)
    assert (launching.seconds, launching.bound, launching.replayed_s) == (9.0, "launches", 3.5)
    assert replace(launching, nodes_s=4.0).replayed_s == 4.0
    assert replace(launching, nodes_s=None).replayed_s == 9.0


def test_graphs_hold_the_scales_that_the_engine_captures():
    found = predict("infinity-2b", "1M", 1, 32, "kernels", replace(SLOW, node_s=1.0))
    captured = [part.scale for part in found if part.nodes_s is not None]
    assert captured == list(range(7)), "the scale of 16 x 16 holds 512 tokens in both rows, the next one more"


@pytest.mark.parametrize(("model", "size"), [("infinity-2b", "1M"), ("infinity-8b", "1M"), ("infinity-125m", "0.06M")])
def test_the_totals_of_the_page_are_what_the_script_prints(
    model: str, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = re.search(rf"^\| {model} \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert shown
    monkeypatch.setattr(sys, "argv", ["predict_gpu.py", "--model", model, "--size", size])
    main()
    table = capsys.readouterr().out
    assert "*predicted*" in table
    kernels, graphs, torch = (cell.strip() for cell in table.splitlines()[-1].split("|") if re.search(r"\d", cell))
    assert shown.groups() == (torch, kernels, graphs)
