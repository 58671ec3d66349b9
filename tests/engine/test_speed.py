"""A gate for speed: the engine beside its naive twin, and a method beside the full run, against stored ratios.

Who makes one of them faster stores what `JAXTYPING_DISABLE=1 python -m tests.engine.speed` prints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).parent / "speed_ratios.json"
SLACK = 1.3
"""How much above what is stored is still noise; an engine that takes half as long again is above it."""


def slower(found: dict[str, float]) -> dict[str, float]:
    """The ratios that are above what is stored by more than noise."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert found.keys() == stored.keys()
    return {name: ratio for name, ratio in found.items() if ratio > SLACK * stored[name]}


def test_the_engine_and_a_method_are_as_fast_as_they_were() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "JAXTYPING_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.engine.speed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert slower(found) == {}, f"measured {found}, at most {SLACK} times {STORED.name}"


def test_what_takes_half_as_long_again_is_found() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert slower(stored) == {}
    for name in stored:
        assert slower({**stored, name: 1.5 * stored[name]}).keys() == {name}
