"""Matmuls of many sizes: what stays of each in the process is bounded."""

import os
import platform
import subprocess
import sys

import pytest

from foveate.kernels.primitive_caches import bound_primitive_caches

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")

SCRIPT = """
import ctypes
import torch
from foveate.kernels.linear import linear, takes_onednn

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
takes_onednn(torch.float32)
with torch.inference_mode():
    weight_oi, x_ni = torch.ones(256, 256), torch.ones(700, 256)
    before = mallinfo2().uordblks
    for count in range(100, 700):
        linear(x_ni[:count], weight_oi)
    print(mallinfo2().uordblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc has handed out")
def test_matmuls_of_many_sizes_leave_bounded_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 150e6


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # Set first, so that the end of the test takes back what the function sets.
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    bound_primitive_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "256"
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    bound_primitive_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "9"
