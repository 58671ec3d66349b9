"""What a scale's time is made of: recovered from exact times, predicted for other plans, stored for one model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.guidance import GuidanceSchedule
from foveate.engine.forecast import forecast_work
from foveate.pipeline.budget import request_of
from foveate.pipeline.pipeline import Pipeline
from foveate.pipeline.profile import (
    FEATURES,
    Profile,
    features,
    features_of,
    fit,
    identity,
    load_profile,
    profile_path,
    store_profile,
)
from foveate.policies.registry import load_policy
from tests.policies.test_contract import SHAPE
from tests.toys import toy

TRUE = (2.0, 0.5, 3.0, 40.0, 7.0)
PROFILE = Profile(ms=TRUE, decoder_ms=((64 * 64, 10.0), (128 * 128, 44.0)), rest_ms=1.0, headroom=1.5)
SPECS = ("full", "random-tokens", "drop-branch:count=99", "uniform-depth:keep_ratio=0.2", "depthvar", "skip-scales")


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEATE_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


def work_of(spec: str):
    subject = toy("square")
    request = request_of(subject.schedule, GuidanceSchedule(weights=(3.0,) * 5), SHAPE)
    return forecast_work(load_policy(spec).bind(subject.schedule, SHAPE), request, SHAPE), request.text_tokens()


def test_features_count_what_a_scale_has():
    rows = features(*work_of("uniform-depth:keep_ratio=0.2,num_scales=1")[:1], SHAPE, work_of("full")[1])
    assert [row[1] for row in rows] == [5, 5, 5, 5, 1]
    assert [row[2] for row in rows] == [n * 2 * depth / 1e3 for n, depth in ((1, 5), (4, 5), (16, 5), (36, 5), (64, 1))]
    assert [row[4] for row in rows] == [1, 0, 0, 0, 0]
    work, lengths = work_of("skip-scales:count=2")
    skipped = features(work, SHAPE, lengths)
    assert skipped[3:] == [[0.0] * 5] * 2
    # The first scale holds what a request prepares once.
    assert skipped[0][3] > 1e-9 * 2 * lengths[(0, True)] * SHAPE.text_token_flops


def test_a_fit_recovers_what_made_the_times():
    points = [row for spec in SPECS for row in features(work_of(spec)[0], SHAPE, work_of(spec)[1]) if row[0]]
    assert fit(points, [float(np.dot(row, TRUE)) for row in points]) == pytest.approx(TRUE, rel=1e-6)
    noise = np.random.default_rng(3).uniform(0.9, 1.1, len(points))
    found = fit(points, [float(np.dot(row, TRUE) * factor) for row, factor in zip(points, noise, strict=True)])
    assert all(factor >= 0 for factor in found)
    for row in points:
        assert np.dot(row, found) == pytest.approx(np.dot(row, TRUE), rel=0.1)


def test_factors_are_never_negative():
    """More tokens in less time: the slope is left out, where plain least squares has it below zero."""
    points = [features_of(1, blocks=5.0, token_blocks=n, flops=1e6) for n in (100.0, 200.0, 300.0)]
    found = fit(points, [30.0, 25.0, 20.0])
    assert min(found) == 0
    assert found[FEATURES.index("thousand_token_blocks")] == 0


def test_times_have_headroom_and_decoding_follows_the_nearest_size():
    work, lengths = work_of("random-tokens")
    rows = features(work, SHAPE, lengths)
    assert PROFILE.scale_ms(work, SHAPE, lengths) == pytest.approx([1.5 * np.dot(row, TRUE) for row in rows])
    assert PROFILE.after_ms(64 * 64, 1) == pytest.approx(1.5 * 11)
    assert PROFILE.after_ms(120 * 120, 2) == pytest.approx(1.5 * (2 * 44 * 120**2 / 128**2 + 1))
    assert Profile.from_json(json.loads(json.dumps(PROFILE.to_json()))) == PROFILE


def test_a_profile_is_found_for_its_model_and_threads_alone(toy_pipe: Pipeline, profiles: Path):
    path = store_profile({"fit": PROFILE.to_json()}, toy_pipe.model)
    assert path.parent == profiles
    assert load_profile(toy_pipe.model) == PROFILE
    stored = json.loads(path.read_text())["identity"]
    assert stored == identity(toy_pipe.model)
    assert (stored["model"], stored["sha256"]) == ("toy", toy_pipe.model.sha256)
    other = replace(toy_pipe.model, sha256="other")
    threads = torch.get_num_threads()
    with pytest.raises(FoveateError, match=f"run foveate bench calibrate --model toy --threads {threads}$"):
        load_profile(other)
    half = replace(other, weights="random", precision=replace(other.precision, dtype=torch.bfloat16))
    with pytest.raises(FoveateError, match=f"--threads {threads} --weights random --dtype bfloat16$"):
        load_profile(half)
    try:
        torch.set_num_threads(threads + 1)
        assert profile_path(toy_pipe.model) != path
    finally:
        torch.set_num_threads(threads)


def test_without_a_folder_of_its_own_it_lies_in_the_cache(
    toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("FOVEATE_PROFILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path(toy_pipe.model).parent == tmp_path / "foveate" / "profiles"


@pytest.mark.parametrize("text", ["{", "[]", '{"fit": {}}', '{"fit": {"ms": null}}'])
def test_a_damaged_profile_is_an_error_with_the_remedy(toy_pipe: Pipeline, profiles: Path, text: str):
    path = store_profile({"fit": PROFILE.to_json()}, toy_pipe.model)
    path.write_text(text)
    with pytest.raises(FoveateError, match="cannot read the profile .*measure it again: foveate bench calibrate"):
        load_profile(toy_pipe.model)
