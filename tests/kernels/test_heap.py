"""Freed memory stays while a request runs, is given back afterwards, also after an exception and with two at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json
from pathlib import Path
import torch
from foveate.kernels.heap import kept_heap

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def touch():
    for _ in range(3):
        torch.ones(25_000_000).add_(1)

touch()
start = resident()
found = {}
touch()
found["without"] = resident() - start
with kept_heap():
    with kept_heap():
        touch()
    found["inside"] = resident() - start
found["after"] = resident() - start
try:
    with kept_heap():
        touch()
        raise KeyError
except KeyError:
    found["after_exception"] = resident() - start
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from Linux")
def test_memory_is_kept_inside_and_given_back_after() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["inside"] > 80e6
    assert all(found[name] < 30e6 for name in ("without", "after", "after_exception"))
