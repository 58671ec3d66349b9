"""The Triton kernels, computed by Triton's interpreter in a process of its own; and when they run at all."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate.kernels.gpu import launch

ROOT = Path(__file__).parents[2]


NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (on Linux make installs it)"
)


@NEEDS_TRITON
@pytest.mark.soak
def test_kernels_equal_their_twins_in_the_interpreter():
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        "JAXTYPING_DISABLE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "tests/kernels/kernel_cases.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counted = re.search(r"^(\d+) passed in", done.stdout, flags=re.MULTILINE)
    assert counted, done.stdout[-300:]
    assert int(counted[1]) > 180


@NEEDS_TRITON
@pytest.mark.soak
def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path):
    """To machine code, at the sizes of the published models; the simple ones read 16 bytes at once."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "TRITON_CACHE_DIR": str(tmp_path),
        "JAXTYPING_DISABLE": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compile_cases"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(line["kernel"], line["target"]) for line in lines} == set(
        itertools.product(("norm", "residual", "heads", "bits", "energy"), (80, 90))
    )
    for line in lines:
        assert line["cubin"] > 0
        assert not line["has_local"], line
        assert line["widest_load"] == 16 or line["kernel"] not in ("norm", "residual", "bits"), line


def test_the_cpu_never_imports_triton():
    """Neither the library nor a drawn image does, and the kernels do not serve tensors on the CPU."""
    code = (
        "import sys, torch, foveate.pipeline.pipeline, foveate.engine.executor, foveate.policies.registry\n"
        "from tests.toys import run, toy\n"
        "from foveate.policies.registry import load_policy\n"
        "run(toy('square'), load_policy('ld-pruning'))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'triton'], 'triton was imported'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_cpu_is_not_served():
    with torch.inference_mode(), launch.enabled(True):
        assert not launch.serves(torch.zeros(2))


@pytest.mark.parametrize(
    ("size", "expected", "warps"),
    [(1, 1, 2), (2, 2, 2), (64, 64, 2), (100, 128, 2), (1024, 1024, 4), (2048, 2048, 8), (3584, 4096, 8)],
)
def test_blocks_are_powers_of_two_with_fixed_warps(size: int, expected: int, warps: int):
    assert launch.power_of_two(size) == expected
    assert launch.num_warps(expected) == warps
