"""A page about a run of the tests: what ran, for how long, and on which machine (`pytest --report FILE`)."""

import collections
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from foveate.bench.machine import describe_machine
from tests import randomness

BEGAN = time.monotonic()
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def write_report(path: Path, stats: Mapping[str, Sequence[object]], arguments: Sequence[str]) -> None:
    """Writes the page; cases of one test are added up.

    Args:
        path: The page; folders are made.
        stats: Reports of pytest by outcome; those of `""` are phases that passed beside the test itself.
        arguments: Of pytest, without the name of the page.
    """
    machine = describe_machine()
    cpu, versions = machine["cpu"], machine["versions"]
    counts = {name: len(stats.get(name, ())) for name in OUTCOMES if stats.get(name)}
    reports = [r for name in (*OUTCOMES, "") for r in stats.get(name, ()) if isinstance(r, pytest.TestReport)]
    passed = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing ran"
    lines = [
        f"# {passed} in {_time(time.monotonic() - BEGAN)}",
        "",
        f"`pytest {' '.join(arguments)}`, {datetime.now(UTC):%Y-%m-%d}, FOVEATE_TEST_SEED={randomness.BASE}",
        "",
        f"- machine: {cpu['name']}, {cpu['cores']} cores, {cpu['capability']}; kernels: {cpu['kernels']}",
        f"- versions: python {versions['python']}, torch {versions['torch']}, pytest {pytest.__version__}",
        f"- seconds of all tests: {sum(report.duration for report in reports):.0f}, in several processes at once",
        "",
        "| test | cases | seconds | outcome |",
        "|---|---|---|---|",
    ]
    for name, (cases, duration, outcomes) in sorted(_by_test(reports).items(), key=lambda item: -item[1][1]):
        lines.append(f"| {name} | {cases} | {duration:.1f} | {outcomes} |")
    reasons = collections.Counter(r.longrepr[2] for r in reports if r.skipped and isinstance(r.longrepr, tuple))
    lines += ["", *(f"- {count} {reason[0].lower()}{reason[1:]}" for reason, count in reasons.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _by_test(reports: Sequence[pytest.TestReport]) -> dict[str, tuple[int, float, str]]:
    """Number of cases, seconds and outcomes of each test; setting up and tearing down count as time of the test."""
    cases: dict[str, set[str]] = collections.defaultdict(set)
    seconds: dict[str, float] = collections.defaultdict(float)
    outcomes: dict[str, set[str]] = collections.defaultdict(set)
    for report in reports:
        name = report.nodeid.partition("[")[0]
        cases[name].add(report.nodeid)
        seconds[name] += report.duration
        if report.when == "call" or report.outcome != "passed":
            outcomes[name].add(report.outcome)
    return {name: (len(cases[name]), seconds[name], ", ".join(sorted(outcomes[name]))) for name in cases}


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else time.strftime("%H:%M:%S", time.gmtime(seconds))
