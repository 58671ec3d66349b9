"""Policies of other packages: found by their entry points, and checked with `foveate.testing` from outside."""

import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent / "plugins"
MAX_LINES = 60

SCRIPT = """
from foveate.policies.registry import load_policy
from foveate.testing import check_policy

policy = load_policy({spec!r})
check_policy(type(policy), [policy])
composed = load_policy({spec!r} + "|drop-branch:count=1")
assert composed.spec == {spec!r} + "|drop-branch:count=1"
print(type(policy).__module__)
"""


@pytest.mark.parametrize(("name", "spec"), [("evict", "keep-recent:window=2"), ("anchors", "anchors:stride=2")])
def test_a_policy_of_another_package_passes_the_contract(name: str, spec: str):
    """In a process of its own, on whose path the package lies as if it were installed."""
    (source,) = (PLUGINS / name).glob("*.py")
    assert len(source.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(spec=spec)],
        env={"PYTHONPATH": str(PLUGINS / name), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == source.stem


def test_the_contract_sees_a_policy_that_breaks_it():
    """Each break is named: a policy that runs more than its ceiling, keeps state, or has no effect."""
    from foveate.testing import check_policy  # noqa: PLC0415 - not collected with the other modules
    from tests.broken_policies import BROKEN  # noqa: PLC0415 - as above

    for kind, settings, message in BROKEN:
        with pytest.raises(AssertionError, match=message):
            check_policy(kind, settings)
