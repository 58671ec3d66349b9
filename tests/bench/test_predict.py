"""The prediction for a GPU: its parts by hand, and the tables of the page are what the script prints."""

import re
import subprocess
import sys
from pathlib import Path

import predict_gpu
import pytest
from predict_gpu import Gpu, predict

ROOT = Path(__file__).parents[2]
SLOW = Gpu(flops_per_s=1e12, bytes_per_s=1e12, launch_s=0.0)


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
    part = predict_gpu.Prediction(scale=0, side="1x1", products_s=2.0, memory_s=1.0, between_s=0.5, launches_s=0.1)
    assert (part.seconds, part.bound) == (2.5, "products")
    launching = predict_gpu.Prediction(scale=0, side="1x1", products_s=2.0, memory_s=3.0, between_s=0.5, launches_s=9.0)
    assert (launching.seconds, launching.bound) == (9.0, "launches")


@pytest.mark.parametrize("model", ["infinity-2b", "infinity-8b"])
def test_the_tables_of_the_page_are_what_the_script_prints(model: str):
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- table:{model} -->\n(.*?)\n<!-- /table -->", page, flags=re.DOTALL)
    assert shown
    command = [sys.executable, str(ROOT / "benchmarks" / "predict_gpu.py"), "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shown[1].strip()
    assert "*predicted*" in shown[1]
