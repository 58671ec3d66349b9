"""Policies of other packages: found by their entry points, and checked with `foveate.testing` from outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent / "plugins"
MAX_LINES = 60

PACKAGES = {"evict": "keep-recent:window=2", "anchors": "anchors:stride=2"}
"""A policy of each package."""

SCRIPT = """
import sys
from foveate.policies.registry import load_policy
from foveate.testing import check_policy

for spec in sys.argv[1:]:
    policy = load_policy(spec)
    check_policy(type(policy), [policy])
    composed = load_policy(spec + "|drop-branch:count=1")
    assert composed.spec == spec + "|drop-branch:count=1"
    print(type(policy).__module__)
"""


def test_policies_of_other_packages_pass_the_contract():
    """In a process of its own, on whose path the packages lie as if they were installed."""
    sources = [next((PLUGINS / name).glob("*.py")) for name in PACKAGES]
    assert all(len(source.read_text(encoding="utf-8").splitlines()) <= MAX_LINES for source in sources)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *PACKAGES.values()],
        env={"PYTHONPATH": os.pathsep.join(str(s.parent) for s in sources), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [source.stem for source in sources]


def test_the_contract_sees_a_policy_that_breaks_it():
    """Each break is named: a policy that runs more than its ceiling, keeps state, or has no effect."""
    from foveate.testing import check_policy  # noqa: PLC0415 - not collected with the other modules
    from tests.broken_policies import BROKEN  # noqa: PLC0415 - as above

    for kind, settings, message in BROKEN:
        with pytest.raises(AssertionError, match=message):
            check_policy(kind, settings)
