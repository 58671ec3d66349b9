"""The host waits for the device once per scale at most, and never where the plan knows the counts.

What runs on a second device that is only pretended is drawn in a process of its own (`tests.engine.pretend_device`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.plan import DepthMap, ScalePlan
from foveate.core.selection import Rule, TokenSelection
from foveate.engine.clock import DeviceClock, HostClock
from foveate.engine.select import choose, in_front, known_counts
from foveate.policies.registry import load_policy
from tests.engine.test_invariants import ACTIVE
from tests.randomness import few
from tests.toys import toy

ROOT = Path(__file__).parents[2]
NOT_PRETENDED = {"late-bfloat16", "skipvar"}
"""A copy of weights in another dtype, and a decoder, which the pretended device does not know."""

CASES = [
    *((spec, "square") for spec in ACTIVE if spec not in NOT_PRETENDED),
    ("ld-pruning", "patches"),
    ("depthvar", "odd"),
    ("full", "var"),
    ("ld-pruning|depthvar", "var"),
    ("full", "square", "graphs"),
    ("ld-pruning", "square", "graphs"),
    ("depthvar", "patches", "graphs"),
    ("drop-branch", "var", "graphs"),
]


NAMES = [" on ".join(case) for case in CASES]
SHOWN = (
    *(f"{spec} on square" for spec in ("ld-pruning", "drop-branch:count=3", "cached-guidance:count=2,keep_ratio=0.3")),
    *("sparsevar:threshold=0.995,stride=3 on square", "fastvar:skip_last=1,reference_scale=-4 on square"),
    *(
        "depthvar on odd",
        "ld-pruning|depthvar on var",
        "ld-pruning on square on graphs",
        "drop-branch on var on graphs",
    ),
)
"""Each way to decide on the device or on the host, on toys of each kind, with graphs and without."""


@pytest.fixture(scope="module")
def pretended(request: pytest.FixtureRequest) -> dict[str, dict]:
    """What the program said of each case that was selected, and of itself."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = [spec.params["case"] for spec in params if spec is not None and "case" in spec.params]
    cases = [name.split(" on ") for name in names]
    folders = [str(ROOT / "src"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.engine.pretend_device", json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(["program", *names], map(json.loads, done.stdout.splitlines()), strict=True))


def test_the_watch_sees_what_makes_the_host_wait(pretended: dict[str, dict]):
    noted = pretended["program"]
    silent = {"index by numbers", "repeat to a known size", "behind the host's back"}
    assert {name for name, waits in noted.items() if not waits} == silent


@pytest.mark.parametrize("case", few(NAMES, *SHOWN, more=1))
def test_the_device_is_read_once_per_scale_at_most(pretended: dict[str, dict], case: str):
    """Same latents as on the CPU, to the bit; static policies wait at the end alone, others read a vector per scale."""
    spec, name, *graphs = case.split(" on ")
    found = pretended[case]
    assert (found["spec"], found["toy"]) == (spec, name)
    assert bool(found["replays"]) == bool(graphs)
    assert found["in_replays"] == [0, 0], "a graph cannot wait, nor read what lies on the host"
    assert found["is_same"]
    for scale, waits in enumerate(found["scales"]):
        assert set(waits) <= {"copy to the host"}
        # Broken numbers, and copies whose source did not run, are flagged on the device and read at the last scale.
        at_end = (1 + spec.startswith("sparsevar")) * (scale == len(found["scales"]) - 1)
        assert sum(waits.values()) <= (0 if found["is_static"] else 1) + at_end
    if spec.startswith("ld-pruning"):
        assert any(found["scales"])


# Counts


def depth_of(depth_Bl: torch.Tensor, num_blocks: int, is_known: bool) -> DepthMap:
    """A depth map whose first image speaks for all."""
    counts = tuple(int((depth_Bl[0] > place).sum()) for place in range(num_blocks))
    order = tuple(reversed(range(num_blocks)))
    return DepthMap(depth_Bl=depth_Bl, order=order, counts=counts if is_known else None)


@settings(max_examples=40)
@given(data=st.data(), num_tokens=st.integers(1, 9), num_images=st.integers(1, 3))
def test_chosen_counts_and_masks_agree_with_the_plan(data: st.DataObject, num_tokens: int, num_images: int):
    """Whatever is known before, read or left out: counts are those of the masks, image by image."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    shares = data.draw(st.lists(st.sampled_from([0.2, 0.5, 1.0]), max_size=2))
    rules = [data.draw(st.sampled_from(list(Rule))) for _ in shares]
    selections = tuple(
        TokenSelection(score_Bl=torch.rand(num_images, num_tokens, generator=generator), share=share, rule=rule)
        for share, rule in zip(shares, rules, strict=True)
    )
    ranked = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(num_images)])
    depths = tuple(
        depth_of(
            ranked if data.draw(st.booleans()) else torch.full_like(ranked, data.draw(st.integers(0, 3))), 3, known
        )
        for known in data.draw(st.lists(st.booleans(), max_size=2))
    )
    plan = ScalePlan(selections=selections, depths=depths)
    chosen = choose(plan, num_images, num_tokens, 3)
    keep_Bl = plan.keep(num_images, num_tokens)
    keep_Bl = torch.ones(num_images, num_tokens, dtype=torch.bool) if keep_Bl is None else keep_Bl
    assert list(chosen.kept[0]) == keep_Bl.sum(-1).tolist()
    assert (chosen.keep_GBl is None) == bool(keep_Bl.all())
    for block in range(3):
        active_Bl = plan.active(block)
        run_Bl = keep_Bl if active_Bl is None else keep_Bl & active_Bl
        assert list(chosen.block_counts[block][0]) == run_Bl.sum(-1).tolist()
        assert chosen.run_PGBl is None or torch.equal(chosen.run_PGBl[block][0], run_Bl)


@pytest.mark.parametrize("spec", ACTIVE)
def test_static_policies_know_their_counts(spec: str):
    """What `is_static` promises before the run is enough to lay out every scale without a read."""
    subject = toy("square")
    bound = load_policy(spec).bind(subject.schedule, subject.model.shape)
    known = [known_counts(bound.ceiling(s.index), s.num_tokens, 5) is not None for s in subject.schedule.scales]
    assert all(known) or not bound.is_static


def test_branches_decided_on_the_device_meet_those_of_the_plan():
    guided_B = torch.tensor([True, False, True])
    chosen = choose(ScalePlan(unconditional=(True, True, False), guided_B=guided_B), 3, 4, 2)
    assert chosen.plan.unconditional == (True, False, False)
    assert chosen.plan.guided_B is None
    met = ScalePlan(guided_B=guided_B).meet(ScalePlan(guided_B=~guided_B))
    assert met.guided_B.tolist() == [False] * 3
    assert choose(ScalePlan(runs=False, guided_B=guided_B), 3, 4, 2).plan.unconditional == (True, False, True)


@settings(max_examples=40)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=12))
def test_masked_values_come_to_the_front_in_order(mask: list[bool]):
    values = list(range(100, 100 + len(mask)))
    found = in_front(torch.tensor([mask]), torch.tensor(values))[0].tolist()
    first = [v for v, m in zip(values, mask, strict=True) if m]
    assert found == first + [v for v in values if v not in first]


# Clocks


class ScriptedMark:
    """A mark that the device reaches at a time that is written down; `log` notes who waited."""

    def __init__(self, times: list[float], log: list[str]) -> None:
        self.times, self.log, self.at = times, log, -1.0

    def record(self, stream: object) -> None:
        assert stream == "queue"
        self.at = self.times.pop(0)

    def synchronize(self) -> None:
        self.log.append("waited")

    def elapsed_time(self, end_event: "ScriptedMark") -> float:
        assert self.log, "nobody waited for the mark"
        return end_event.at - self.at


@pytest.mark.parametrize(("waits", "early"), [(False, [0.0, 0.0]), (True, [2.5, 6.0])])
def test_device_clock_waits_once_at_the_end_or_at_every_scale(waits: bool, early: list[float]):
    log: list[str] = []
    times = [1.0, 3.5, 4.0, 10.0]
    clock = DeviceClock(lambda: ScriptedMark(times, log), "queue", waits)
    stops = []
    for _ in range(2):
        clock.start()
        stops.append(clock.stop())
    assert stops == early
    assert len(log) == (2 if waits else 0)
    assert clock.read() == [2.5, 6.0]
    assert log[-1] == "waited"


def test_host_clock_tells_at_once():
    clock = HostClock()
    clock.start()
    first = clock.stop()
    clock.start()
    assert clock.read() == [first]
    second = clock.stop()
    assert first >= 0
    assert clock.read() == [first, second]
