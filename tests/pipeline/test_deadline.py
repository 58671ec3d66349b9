"""Deadlines: the first level by prediction, later ones by the clock, both stored and replayed without one."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.families.residency import Residency
from foveate.pipeline import deadline
from foveate.pipeline.bulk import _largest
from foveate.pipeline.deadline import Deadline, Ladder
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.profile import Profile, store_profile
from foveate.pipeline.provenance import regenerate, save_image
from foveate.policies.registry import from_stored, load_policy
from foveate.policies.step_down import StepDown

PER_TOKEN_BLOCK = Profile(ms=(0.0, 0.0, 1000.0, 0.0, 0.0), decoder_ms=((256 * 256, 50.0),), rest_ms=10.0, headroom=1.0)
"""A millisecond for each block of each token: 3126 for the full run of the toy, 1536 of them at its last scale."""

FAMILY = "random-tokens:num_scales=2"


@pytest.fixture
def pipe(toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The toy with a profile of a machine that is far slower than any, so that real time hardly counts."""
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path / "profiles"))
    store_profile({"fit": PER_TOKEN_BLOCK.to_json()}, toy_pipe.model)
    return toy_pipe


class Clock:
    """Time that passes as a test says: the seconds of `slow` before every scale from that one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: dict[int, float]) -> None:
        self.offset, self.slow = 0.0, slow
        real, asked = time.perf_counter, Deadline.remaining_ms
        monkeypatch.setattr(deadline.time, "perf_counter", lambda: real() + self.offset)

        def remaining(this: Deadline, scale: int) -> float:
            if scale not in this.said:
                self.offset += self.slow.get(scale, 0.0)
            return asked(this, scale)

        monkeypatch.setattr(Deadline, "remaining_ms", remaining)


def ladder(pipe: Pipeline, family: str = FAMILY) -> Ladder:
    return Ladder.of(pipe.job("a red cat", {"policy": family, "latency_budget_ms": 1.0}), pipe.model)


def test_levels_fall_from_the_full_run_to_the_least_of_the_dial(pipe: Pipeline):
    levels = ladder(pipe).levels
    assert levels[0].policy == load_policy("full")
    assert levels[-1].policy == load_policy(f"{FAMILY},keep_ratio=0.0001")
    assert [level.policy.keep_ratio for level in levels[1:-1]] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert levels[0].needs_ms[0] == pytest.approx(6 * 521)
    assert levels[5].needs_ms[-1] == pytest.approx(6 * 128)
    assert ladder(pipe).after_ms == pytest.approx(60.0)


@pytest.mark.parametrize(
    ("left_ms", "first"), [(9e9, None), (3126.0 + 60, None), (3126.0 + 59, 0.9), (2000.0, 0.5), (1.0, 0.0001)]
)
def test_the_first_level_is_the_best_that_should_be_in_time(pipe: Pipeline, left_ms: float, first: float | None):
    steps = ladder(pipe).policy(left_ms).steps
    assert steps[0] == load_policy("full" if first is None else f"{FAMILY},keep_ratio={first}")
    assert steps[-1].keep_ratio == 0.0001
    needs = ladder(pipe).policy(left_ms).needs_ms
    assert all(a[0] > b[0] for a, b in pairwise(needs))


def test_a_call_without_haste_runs_in_full_and_says_that_it_met_its_budget(pipe: Pipeline, tmp_path: Path):
    out = pipe("a red cat", seed=3, policy=FAMILY, latency_budget_ms=1e6)
    plain = pipe("a red cat", seed=3)
    assert out.images[0].tobytes() == plain.images[0].tobytes()
    assert (out.config["policy"], out.config["asked"]) == (plain.config["policy"], {"latency_budget_ms": 1e6})
    assert out.report.late_ms == pytest.approx(out.report.ms.total - 1e6)
    assert plain.report.late_ms is None
    assert "deadline_missed" not in {warning.code for warning in out.report.warnings}


def test_scales_step_down_as_time_runs_short_and_files_replay_them(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The full run fits at first; then the machine loses nine seconds in front of the last scale but one."""
    Clock(monkeypatch, {5: 9.0})
    out = pipe(["a red cat", "a dog"], seed=[3, 4], policy=FAMILY, latency_budget_ms=2 * 3126 + 110 + 5000)
    policy = from_stored(out.config["policy"]["parts"])
    assert isinstance(policy, StepDown)
    assert policy.steps[0] == load_policy("full")
    assert policy.taken[:5] == (0,) * 5
    assert policy.taken[5] > 0
    assert policy.needs_ms == ()
    head = [row.head_tokens for scale in out.trace.scales for (_, is_cond), row in scale.work.rows.items() if is_cond]
    assert head[:10] == [n for n in (1, 4, 16, 36, 64) for _ in range(2)]
    assert head[10] == head[11] < 144
    monkeypatch.undo()
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path / "none"))
    for row in (0, 1):
        path = save_image(out.images[row], tmp_path / f"{row}.png", out.row_config(row))
        again = regenerate(path, pipe)
        assert (again.is_identical, again.differences) == (True, ())


def test_memory_is_planned_for_what_lower_levels_keep(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    """At the given setting nothing is kept; the full run needs the most keys, and lower levels need fills."""
    call = {"policy": "blocks-per-scale:keep_ratios=[1,1]", "latency_budget_ms": 2 * 3126 + 110 + 5000}
    need, _ = _largest(pipe, pipe.job("a red cat", call), Residency())
    Clock(monkeypatch, {5: 9.0})
    out = pipe("a red cat", seed=3, **call)
    assert isinstance(from_stored(out.config["policy"]["parts"]), StepDown)
    assert out.report.kv_bytes_peak <= need.kv
    plain, _ = _largest(pipe, pipe.job("a red cat", {"policy": call["policy"]}), Residency())
    assert (plain.fills, plain.kv) == (0, need.kv)
    assert need.fills > 0


def test_a_budget_that_was_missed_is_said_by_how_much(pipe: Pipeline, caplog: pytest.LogCaptureFixture):
    out = pipe("a red cat", seed=3, policy=FAMILY, latency_budget_ms=0.5, output_type="latent")
    (warning,) = [warning for warning in out.report.warnings if warning.code == "deadline_missed"]
    total = out.report.ms.total
    assert warning.message.startswith(
        f"the call took {total:.0f} ms, {total - 0.5:.0f} ms more than latency_budget_ms 0.5"
    )
    assert warning.message in [record.getMessage() for record in caplog.records]
    assert out.report.late_ms == pytest.approx(total - 0.5)
    assert out.config["policy"]["spec"] == "random-tokens:keep_ratio=0.0001,num_scales=2"


def test_all_images_hear_the_same_time(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    found = Deadline.of(ladder(pipe), 1000.0, time.perf_counter())
    first = found.remaining_ms(3)
    monkeypatch.setattr(deadline.time, "perf_counter", lambda: 1e9)
    assert found.remaining_ms(3) == first
    assert found.remaining_ms(4) == 0
    assert first in {needs[3] for needs in found.policy.needs_ms} | {0.0}


def test_steps_that_were_taken_are_stored_without_those_that_were_not():
    full, half, least = (load_policy(spec) for spec in ("full", "random-tokens", "skip-scales"))
    policy = StepDown(steps=(full, half, least), needs_ms=((9.0, 6.0, 3.0), (6.0, 4.0, 2.0), (3.0, 2.0, 1.0)))
    assert Deadline(policy=policy, ends=0.0, said={1: 6.0, 2: 3.0}).taken() == full
    assert Deadline(policy=policy, ends=0.0, said={1: 0.0, 2: 0.0}).taken() == StepDown(
        steps=(full, least), taken=(0, 1, 1)
    )
    assert Deadline(policy=policy, ends=0.0, said={1: 4.0, 2: 3.0}).taken() == StepDown(
        steps=(full, half), taken=(0, 1, 1)
    )


def test_a_machine_without_a_profile_says_how_to_make_one(toy_pipe: Pipeline, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path))
    message = "^latency_budget_ms needs a profile of toy on this machine, .* run foveate bench calibrate --model toy -"
    with pytest.raises(FoveateError, match=message):
        toy_pipe("a red cat", seed=3, latency_budget_ms=100)


def test_a_stream_has_the_deadline_too(pipe: Pipeline):
    *_, last = pipe.stream("a red cat", previews=0, seed=3, policy=FAMILY, latency_budget_ms=1e6)
    assert last.output is not None
    assert last.output.report.late_ms < 0
