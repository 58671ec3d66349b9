"""`latency_budget_ms` over HTTP: with a profile of the machine the policy steps down, without one it says so."""

from pathlib import Path

import pytest

from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.profile import Profile, store_profile
from foveate.server.admission import asked_of
from foveate.server.scheduler import Scheduler
from foveate.server.schemas import ImageRequest
from foveate.server.settings import ServerSettings
from tests.server.test_scheduler import Heard

SLOW = Profile(ms=(0.0, 0.0, 1000.0, 0.0, 0.0), decoder_ms=((256 * 256, 50.0),), rest_ms=10.0, headroom=1.0)
"""A millisecond for each block of each token, 3126 for the full run of the toy: far slower than any machine."""

BODY = ImageRequest(prompt="a red cat", seed=1, policy="random-tokens:num_scales=2", latency_budget_ms=2000.0)


def test_a_policy_steps_down_where_the_machine_is_known(
    toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path))
    store_profile({"fit": SLOW.to_json()}, toy_pipe.model)
    asked = asked_of(BODY, toy_pipe, ServerSettings(), "k")
    assert asked.warnings == ()
    scheduler, heard = Scheduler(toy_pipe), Heard()
    scheduler.start()
    try:
        scheduler.submit(asked.work, heard)
        (done,) = heard.wait().events[-2:-1]
    finally:
        scheduler.close(0.0)
    assert "random-tokens" in done.output.config["policy"]["spec"], "one level, or steps down the levels"
    assert done.output.report.flops_ratio < 0.9
    assert not done.is_coarse


def test_without_a_profile_it_is_only_cut(toy_pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path))
    asked = asked_of(BODY, toy_pipe, ServerSettings(), "k")
    (warning,) = asked.warnings
    assert warning.code == "deadline_without_levels"
    assert "foveate bench calibrate" in warning.message
    assert asked.job.options["latency_budget_ms"] is None
    assert asked.work.budget_ms == 2000.0
