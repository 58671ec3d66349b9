"""A slice of the suite as on a processor with AVX2 alone: C code off, oneDNN on, vectors of torch held to AVX2."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "FOVEATE_NATIVE": "0",
    "FOVEATE_ONEDNN": "1",
    "OMP_NUM_THREADS": "1",
    "JAXTYPING_DISABLE": "1",
}
SLICE = (
    "tests/kernels/processor_cases.py",
    "tests/kernels/test_invariance.py::test_a_single_row_is_the_first_of_two",
    "tests/kernels/test_invariance.py::test_norm_and_residual_of_rows_alone",
    "tests/kernels/test_invariance.py::test_heads_of_tokens_alone",
    "tests/kernels/test_invariance.py::test_activations_of_tokens_alone",
    "tests/kernels/test_invariance.py::test_attention_of_rows_alone",
    "tests/kernels/test_kernels.py::test_linear_equals_plain_arithmetic",
)
LEAST = 150
"""Cases of the slice, or it has lost some."""


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"),
    reason="nothing holds oneDNN to instructions here",
)
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2", reason="the whole suite runs on such a processor here"
)
def test_a_slice_of_the_suite_as_on_a_processor_with_avx2():
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "-p"]
    done = subprocess.run(
        [*command, "no:cacheprovider", *SLICE],
        env={**os.environ, **AVX2, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counted = re.search(r"^(\d+) passed", done.stdout, flags=re.MULTILINE)
    assert counted, done.stdout[-300:]
    assert int(counted[1]) >= LEAST
