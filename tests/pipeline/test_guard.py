"""The guard: which images it checks, what drift it finds, and that it gives up on a policy once, and says so once."""

import json
import logging

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core.errors import FoveateError
from foveate.pipeline.guard import Guard, is_chosen, psnr
from foveate.pipeline.pipeline import Pipeline

MILD, HARSH = "random-tokens:num_scales=1,keep_ratio=0.9", "skip-scales:count=5"


def test_the_share_is_a_hash_of_prompt_and_seed():
    chosen = [is_chosen("a cat", seed, 0.1) for seed in range(2000)]
    assert 150 < sum(chosen) < 250
    assert chosen == [is_chosen("a cat", seed, 0.1) for seed in range(2000)]
    assert chosen != [is_chosen("a dog", seed, 0.1) for seed in range(2000)]
    assert all(is_chosen("a cat", seed, 0.2) for seed in range(2000) if chosen[seed])
    assert not any(is_chosen("a cat", seed, 0.0) for seed in range(100))
    assert all(is_chosen("a cat", seed, 1.0) for seed in range(100))


def test_drift_is_the_distance_to_the_full_run_of_the_same_image(toy_pipe: Pipeline):
    guard = fv.Guard(toy_pipe, HARSH, share=1.0, bound=0.0)
    options = {"seed": 3, "negative_prompt": "green", "num_images_per_prompt": 2, "guidance_scale": 3.0}
    out = guard("a red cat", **options)
    assert out.config["policy"]["spec"] == HARSH
    assert guard.num_waiting == 2
    full = toy_pipe("a red cat", **options)
    expected = [psnr(np.asarray(a), np.asarray(b)) for a, b in zip(out.images, full.images, strict=True)]
    assert [drift.psnr for drift in guard.settle(most=1)] == expected[:1]
    assert guard.num_waiting == 1
    assert [drift.psnr for drift in guard.settle()] == pytest.approx(expected[1:])
    assert min(expected) > 5
    assert max(expected) < 60
    data = json.loads(json.dumps(guard.to_json()))
    assert (data["answered"], data["checked"], data["waiting"], data["is_broken"]) == (2, 2, 0, False)
    assert data["psnr"] == {"mean": pytest.approx(sum(expected) / 2), "min": min(expected)}
    assert [entry["policy"] for entry in data["latest"]] == [HARSH] * 2
    assert "cat" not in json.dumps(data)
    assert len({entry["key"] for entry in data["latest"]}) == 2


def test_a_broken_bound_switches_to_full_and_is_said_once(toy_pipe: Pipeline, caplog: pytest.LogCaptureFixture):
    with fv.Guard(toy_pipe, HARSH, share=1.0, bound=90.0) as guard, caplog.at_level(logging.WARNING, logger="foveate"):
        first = guard("a red cat", seed=3)
        assert not guard.is_broken
        guard.settle()
        assert guard.is_broken
        outputs = [guard("a red cat", seed=3) for _ in range(2)]
    assert first.config["policy"]["spec"] == HARSH
    assert [out.config["policy"]["spec"] for out in outputs] == ["full"] * 2
    codes = [[w.code for w in out.report.warnings if w.code == "guard_switched"] for out in (first, *outputs)]
    assert codes == [[], ["guard_switched"], []]
    message = next(w.message for w in outputs[0].report.warnings if w.code == "guard_switched")
    assert message.startswith(f"{HARSH} came ")
    assert "below the bound of 90 dB: requests run in full from now on" in message
    assert [record.getMessage() for record in caplog.records].count(message) == 1
    assert outputs[0].row_config(0)["warnings"][-1] == {"code": "guard_switched", "message": message}
    assert guard.to_json()["warnings"] == [{"code": "guard_switched", "message": message}]
    # What runs in full has nothing to check.
    assert guard.num_waiting == 0


def test_the_mean_of_the_latest_checks_decides(toy_pipe: Pipeline):
    guard = Guard(toy_pipe, MILD, share=1.0, bound=10.0, window=2)
    for seed in (1, 2, 3):
        guard("a red cat", seed=seed)
    found = [drift.psnr for drift in guard.settle()]
    assert guard.to_json()["psnr"] == {"mean": pytest.approx(sum(found[1:]) / 2), "min": min(found)}
    assert not guard.is_broken


def test_nothing_is_checked_where_nothing_is_asked_for_or_one_image_is_no_request(toy_pipe: Pipeline):
    with Guard(toy_pipe, MILD, share=0.0) as guard:
        guard("a red cat", seed=1)
    assert guard.to_json()["psnr"] is None
    with Guard(toy_pipe, MILD, share=1.0) as guard:
        guard(["a red cat", "a dog"], seed=1, rng="reference")
        guard("a red cat", generator=torch.Generator().manual_seed(3), rng="reference")
        assert guard.num_waiting == 0


def test_psnr_by_hand():
    image = np.full((4, 4, 3), 7, np.uint8)
    assert psnr(image, image + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(np.zeros_like(image), np.full_like(image, 255)) == 0
    assert psnr(image, image) == 100


def test_an_image_that_equals_its_full_run_has_100_db(toy_pipe: Pipeline):
    with Guard(toy_pipe, "full", share=1.0) as guard:
        guard("a red cat")
        (drift,) = guard.settle()
    assert drift.psnr == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"bound": 100.0}, r"bound must be a PSNR in \[0, 100\) dB, got 100.0"),
        ({"window": 0}, "window must be 1 or more, got 0"),
    ],
)
def test_wrong_settings_are_refused(toy_pipe: Pipeline, options, message: str):
    with pytest.raises(FoveateError, match=message):
        Guard(toy_pipe, MILD, **options)


def test_the_guard_decides_about_the_policy(toy_pipe: Pipeline):
    for name in ("policy", "budget", "latency_budget_ms"):
        with pytest.raises(FoveateError, match=f"the guard decides about the policy; leave {name} out"):
            Guard(toy_pipe, MILD)("a red cat", **{name: None})


def test_the_guard_answers_with_images_that_it_can_compare(toy_pipe: Pipeline):
    guard, options = Guard(toy_pipe, "skip-scales", share=1.0), {"output_type": "pt"}
    with pytest.raises(FoveateError, match="leave output_type out"):
        guard("a red cat", seed=1, **options)
    assert guard.num_waiting == 0
