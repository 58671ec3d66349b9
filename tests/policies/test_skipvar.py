"""SkipVAR against plain loops: features of decoded images, what the models choose, and what then runs."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import fit_skipvar
import numpy as np
import pytest
import torch

from foveate.core.errors import FoveateError
from foveate.core.policy import Directive
from foveate.core.schedule import ScaleSchedule
from foveate.core.signals import Decoded
from foveate.policies.registry import load_policy
from foveate.policies.skipvar import FEATURES, CountModel, SkipModel, SkipVAR, features
from foveate.testing.toys import randomise, tiny_tokenizer
from tests.policies.following import assert_forecast_holds
from tests.toys import (
    LENGTHS,
    SEEDS,
    Toy,
    cached_run,
    checked,
    make_request,
    run,
    same_bits,
    toy,
)

NEVER, ONE, TWO, THREE = (
    {"weights": [[0, 0]] * 4, "biases": [10.0 * (count == chosen) for count in range(4)]} for chosen in range(4)
)
"""Models that always choose the same count."""


@cache
def subject(name: str) -> Toy:
    """The toy with a decoder whose weights are drawn too; latents do not depend on it."""
    known = toy(name)
    tokenizer = tiny_tokenizer(known.schedule.patch)
    randomise(tokenizer.autoencoder, seed=9)
    return replace(known, tokenizer=tokenizer)


def by_feature(threshold: float, count: int) -> dict[str, list]:
    """Chooses a count where the first feature is above a threshold, else none."""
    weights, biases = [[0.0, 0.0] for _ in range(4)], [0.0, -99.0, -99.0, -99.0]
    weights[count], biases[count] = [1000.0, 0.0], -1000.0 * threshold
    return {"weights": weights, "biases": biases}


def policy_of(folder: Path, scales: dict, branch: dict, /, **changes: object) -> SkipVAR:
    """A policy with models of our own."""
    data = {"features": list(FEATURES), "means": [0, 0], "deviations": [1, 1], "scales": scales, "branch": branch}
    path = folder / "model.json"
    path.write_text(json.dumps(data | changes))
    return SkipVAR(model=str(path))


# Slow twins


def small_latent(f_hat_ZHW: np.ndarray) -> np.ndarray:
    """8x8 cells, each the mean of the latents that it touches."""
    out = np.zeros((len(f_hat_ZHW), 8, 8))
    _, height, width = f_hat_ZHW.shape
    for i in range(8):
        for j in range(8):
            rows = slice(i * height // 8, -(-(i + 1) * height // 8))
            columns = slice(j * width // 8, -(-(j + 1) * width // 8))
            out[:, i, j] = f_hat_ZHW[:, rows, columns].mean((1, 2))
    return out


def sobel(gray: np.ndarray) -> np.ndarray:
    out = np.zeros_like(gray)
    for y in range(gray.shape[0]):
        for x in range(gray.shape[1]):
            near = np.array(
                [
                    [
                        gray[min(max(y + i, 0), gray.shape[0] - 1), min(max(x + j, 0), gray.shape[1] - 1)]
                        for j in (-1, 0, 1)
                    ]
                    for i in (-1, 0, 1)
                ]
            )
            across = (near[:, 2] - near[:, 0]) @ [1, 2, 1]
            down = (near[2] - near[0]) @ [1, 2, 1]
            out[y, x] = math.hypot(across, down)
    return out


def spectrum(gray: np.ndarray) -> np.ndarray:
    """The discrete Fourier transform by its definition, as energies."""
    height, width = gray.shape
    down = np.exp(-2j * np.pi * np.outer(np.arange(height), np.arange(height)) / height)
    across = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)
    return np.abs(down @ gray @ across) ** 2


def loop_features(before: np.ndarray, after: np.ndarray) -> list[float]:
    before, after = before.mean(0), after.mean(0)
    energy, high = spectrum(after), 0.0
    for (u, v), value in np.ndenumerate(energy):
        # Frequencies beyond the middle are negative ones; Nyquist is half a cycle a pixel.
        fy, fx = (min(k, size - k) / size for k, size in zip((u, v), energy.shape, strict=True))
        high += value * (math.hypot(fy, fx) / 0.5 > 0.4)
    return [math.log(np.abs(sobel(after) - sobel(before)).mean()), math.log(high / energy.sum())]


def seen_features(name: str, image: int) -> list[float]:
    """Of one image of the usual full run, from its latents after scales 0 and 1."""
    pictures = []
    for scale in (0, 1):
        latent = torch.from_numpy(small_latent(cached_run("full", name).f_hats[scale][image].double().numpy()))
        pictures.append(subject(name).tokenizer.decode(latent[None].float())[0].double().numpy())
    return loop_features(*pictures)


def between(name: str) -> tuple[float, list[bool]]:
    """A threshold on the first feature that separates the images, and who is above it."""
    values = [seen_features(name, image)[0] for image in range(3)]
    ordered = sorted(values)
    threshold = (ordered[0] + ordered[1]) / 2
    assert ordered[1] - ordered[0] > 0.01
    return threshold, [value > threshold for value in values]


# Features and models


def test_features_equal_the_loops():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(3, 3, 11, 8, generator=generator) for _ in range(2))
    ours = features(before, after)
    for image in range(3):
        expected = loop_features(before[image].double().numpy(), after[image].double().numpy())
        assert ours[image].tolist() == pytest.approx(expected, rel=1e-4)
    assert features(after, after)[:, 0].tolist() == pytest.approx([math.log(1e-9)] * 3)


@pytest.mark.parametrize("name", ["square", "wide", "odd", "patches"])
def test_the_engine_decodes_what_the_features_are_made_of(name: str, tmp_path: Path):
    result = run(subject(name), policy_of(tmp_path, NEVER, NEVER))
    pictures = [result.bound.signals[scale][Decoded(side=8)] for scale in (1, 2)]
    ours = features(*pictures)
    for image in range(3):
        assert ours[image].tolist() == pytest.approx(seen_features(name, image), abs=1e-3)


def loop_choice(model: CountModel, inputs: list[float], confidence: float) -> int:
    logits = [b + sum(w * x for w, x in zip(row, inputs, strict=True)) for row, b in zip(model.weights, model.biases, strict=True)]  # fmt: skip # noqa: E501
    shares = np.exp(logits) / np.exp(logits).sum()
    best = 0
    for count in range(len(shares)):
        if sum(shares[count:]) >= confidence - 1e-12:
            best = count
    return best


@pytest.mark.parametrize("confidence", [0.05, 0.3, 0.5, 0.8, 0.99])
def test_choice_is_the_largest_count_that_is_likely_enough(confidence: float):
    draws = np.random.default_rng(3)
    for _ in range(50):
        model = CountModel(weights=tuple(map(tuple, draws.normal(size=(4, 2)))), biases=tuple(draws.normal(size=4)))
        inputs = draws.normal(size=2).tolist()
        assert model.choose(inputs, confidence) == loop_choice(model, inputs, confidence)
    assert CountModel(weights=((0.0,), (0.0,)), biases=(0.0, 0.0)).choose([1.0], 0.5) == 1
    assert CountModel(weights=((0.0,), (0.0,)), biases=(800.0, -800.0)).choose([1.0], 0.5) == 0


def test_inputs_are_standardised(tmp_path: Path):
    policy = policy_of(tmp_path, NEVER, NEVER, means=[1, -2], deviations=[2, 0.5])
    assert SkipModel.load(policy.model).standardised([2.0, -1.0]) == [0.5, 2.0]


# In the engine


@pytest.mark.parametrize("count", [1, 2, 3])
def test_left_out_scales_are_those_of_skip_scales(count: int, tmp_path: Path):
    result = run(subject("square"), policy_of(tmp_path, (NEVER, ONE, TWO, THREE)[count], TWO))
    assert same_bits(result, cached_run(f"skip-scales:count={count}", "square"))
    assert [scale.ran for scale in result.trace.scales] == [True] * (5 - count) + [False] * count
    assert result.trace.unfired == (Directive.BRANCH.value,)


@pytest.mark.parametrize("count", [1, 3])
def test_else_the_branch_stops_as_in_drop_branch(count: int, tmp_path: Path):
    result = run(subject("wide"), policy_of(tmp_path, NEVER, (NEVER, ONE, TWO, THREE)[count]))
    assert same_bits(result, cached_run(f"drop-branch:count={count}", "wide"))
    assert result.trace.unfired == (Directive.SCALES.value,)


def test_each_image_of_a_request_stops_its_own_branch(tmp_path: Path):
    threshold, is_above = between("square")
    result = run(subject("square"), policy_of(tmp_path, NEVER, by_feature(threshold, 2)))
    assert sorted(is_above) == [False, True, True]
    for scale in result.trace.scales:
        for image in range(3):
            assert ((image, False) in scale.work.rows) == (scale.scale < 3 or not is_above[image])


def test_scales_go_only_if_every_image_of_the_request_says_so(tmp_path: Path):
    """One image says none: all run. Each image by itself leaves out what it says."""
    threshold, is_above = between("square")
    policy = policy_of(tmp_path, by_feature(threshold, 2), NEVER)
    assert same_bits(run(subject("square"), policy), cached_run("full", "square"))
    for image in range(3):
        request = make_request(toy("square").schedule, [SEEDS[image]], [LENGTHS[image]])
        alone = run(subject("square"), policy, request)
        assert [scale.ran for scale in alone.trace.scales][3:] == [not is_above[image]] * 2


def test_an_image_that_may_not_skip_still_asks_the_second_model(tmp_path: Path):
    threshold, is_above = between("square")
    result = run(subject("square"), policy_of(tmp_path, by_feature(threshold, 3), by_feature(threshold, 1)))
    assert all(scale.ran for scale in result.trace.scales)
    assert [(image, False) in result.trace.scales[4].work.rows for image in range(3)] == [not x for x in is_above]


@pytest.mark.parametrize("kind", ["scales", "branch"])
def test_cost_stays_below_what_was_said_before(kind: str, tmp_path: Path):
    policy = policy_of(tmp_path, ONE if kind == "scales" else NEVER, ONE)
    assert_forecast_holds(run(subject("square"), policy), "square", is_static=False)


def test_short_schedules_decide_as_soon_as_two_scales_ran(tmp_path: Path):
    four = {"weights": [[0, 0]] * 6, "biases": [0, 0, 0, 0, 0, 99.0]}
    policy = policy_of(tmp_path, four, four)
    result = run(subject("square"), policy)
    assert [scale.ran for scale in result.trace.scales] == [True, True, False, False, False]
    tiny = policy.bind(ScaleSchedule.from_grids(((1, 1), (2, 2))), toy("square").model.shape)
    assert tiny.directives == ()
    assert not tiny.record(0)


@pytest.mark.parametrize("count", [3, 4])
def test_another_part_may_leave_out_the_scales_that_are_read(count: int, tmp_path: Path):
    """They are the last ones, so nothing is left to decide."""
    policy = policy_of(tmp_path, TWO, TWO) | load_policy(f"skip-scales:count={count}")
    assert same_bits(run(subject("square"), policy), cached_run(f"skip-scales:count={count}", "square"))


def test_pictures_are_decoded_only_for_the_decision():
    bound = SkipVAR().bind(ScaleSchedule.from_template(1.0, "1M"), toy("square").model.shape)
    assert [s for s in range(13) if bound.record(s)] == [8, 9]
    assert bound.record(9) == {Decoded(side=8)}
    assert bound.directives == (Directive.SCALES, Directive.BRANCH)
    assert not bound.is_static


# Settings and files


def test_shipped_models_are_sound_and_named():
    model = SkipModel.load("")
    path = Path(fit_skipvar.ROOT) / "src" / "foveate" / "data" / "skipvar.json"
    data = json.loads(path.read_text())
    assert model.num_scales == 3
    assert data["fitted"]["model"] == "emoji"
    assert data["fitted"]["prompts"] == 64
    # Calm images may lose scales and busy ones may not.
    assert model.scales.choose([-3.0, -3.0], 0.5) > model.scales.choose([3.0, 3.0], 0.5) == 0
    assert path.stat().st_size < 4096


def test_neutral_reads_no_file_and_is_full():
    result = run(subject("odd"), SkipVAR.neutral().replace(model="nowhere.json"))
    assert same_bits(result, cached_run("full", "odd"))
    assert result.bound.directives == ()
    assert result.bound.is_static
    assert not any(result.bound.record(scale) for scale in range(5))


@pytest.mark.parametrize("value", [0.0, 1.5, math.nan])
def test_wrong_settings_are_refused_by_name(value: float):
    with pytest.raises(FoveateError, match=f"confidence must be .* got {value}"):
        checked(SkipVAR(), "confidence", value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"means": 3}', "\x80\x04N."])
def test_what_is_no_model_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    for model in (str(path), str(tmp_path / "missing.json")):
        with pytest.raises(FoveateError, match=f"cannot read the skipvar model {model}"):
            SkipVAR(model=model).bind(toy("square").schedule, toy("square").model.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"features": ["sobel_difference"]},
        {"means": [0]},
        {"deviations": [1, 0]},
        {"means": [0, math.nan]},
        {"branch": {"weights": [[0, 0]] * 3, "biases": [0, 0, 0]}},
        {"scales": {"weights": [[0]] * 4, "biases": [0, 0, 0, 0]}},
        {"scales": {"weights": [[0, 0]] * 4, "biases": [0, 0, 0]}},
    ],
)
def test_models_that_do_not_fit_together_are_refused(changes: dict, tmp_path: Path):
    policy = policy_of(tmp_path, NEVER, NEVER, **changes)
    with pytest.raises(FoveateError, match=r"model.json must be two models of equal counts over the features"):
        policy.bind(toy("square").schedule, toy("square").model.shape)


# The recipe


def test_labels_are_the_largest_counts_above_the_bound():
    db = np.array([[30.0, 27.0, 20.0], [25.0, 27.0, 24.0], [25.0, 25.0, 25.0], [26.0, 26.0, 26.0]])
    assert fit_skipvar.largest_counts(db, 26.0).tolist() == [2, 2, 0, 3]


def test_fit_is_where_the_gradient_vanishes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit_skipvar, "STEPS", 4000)
    draws = np.random.default_rng(0)
    inputs = draws.normal(size=(60, 2))
    labels = (inputs[:, 0] + 0.3 * draws.normal(size=60) > 0).astype(int) * 2
    model = fit_skipvar.fit(inputs, labels, 4)
    assert np.mean(fit_skipvar.predict(model, inputs) == labels) > 0.85
    weights, biases = np.array(model.weights), np.array(model.biases)
    shares = np.exp(inputs @ weights.T + biases)
    error = shares / shares.sum(1, keepdims=True) - np.eye(4)[labels]
    assert np.abs(error.T @ inputs + weights).max() < 1e-3
    assert np.abs(error.sum(0) + fit_skipvar.BIAS_PENALTY * biases).max() < 2e-2
