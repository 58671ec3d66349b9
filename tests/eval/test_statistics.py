"""Bootstrap intervals: what they cover, what they resample, and that they are always the same."""

import numpy as np
import pytest

from foveate.eval.statistics import NUM_RESAMPLES, interval, spread
from tests.randomness import seed_of


def test_an_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(seed_of("bootstrap")).normal(30, 4, 200)
    found = interval(values, 200)
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.3 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.3 * half)
    wider = interval(values, 200, level=0.99)
    assert wider is not None
    assert wider.low < found.low < found.high < wider.high


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(seed_of("coverage"))
    covered = 0
    for _ in range(60):
        found = interval(rng.normal(0, 1, 40), 40, level=0.8)
        assert found is not None
        covered += found.low <= 0 <= found.high
    assert 0.6 < covered / 60 < 0.95


def test_the_same_values_have_the_same_interval() -> None:
    values = np.random.default_rng(1).random(12)
    assert interval(values, 12, "p10") == interval(values.copy(), 12, "p10")
    assert NUM_RESAMPLES >= 1000


def test_images_of_one_prompt_count_as_one_observation() -> None:
    of_prompts = np.random.default_rng(2).normal(0, 1, 10)
    apart, together = interval(of_prompts, 10), interval(of_prompts.repeat(7), 10)
    as_if_alone = interval(of_prompts.repeat(7), 70)
    assert apart is not None
    assert together is not None
    assert as_if_alone is not None
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high)), "copies of an image say nothing new"
    assert as_if_alone.high - as_if_alone.low < 0.6 * (apart.high - apart.low)


def test_what_could_not_be_scored_is_left_out_and_one_prompt_says_nothing() -> None:
    values = np.array([1.0, 2.0, 3.0, np.nan])
    assert interval(values, 4) == interval(values[:3], 3)
    assert interval([1.0, 2.0], 1) is None
    assert interval([1.0, np.nan], 2) is None


def test_spread() -> None:
    found = spread([float(value) for value in range(11)])
    assert (found.p10, found.median, found.p90) == (1, 5, 9)


@pytest.mark.parametrize("statistic", ["mean", "p90", "min"])
def test_resamples_are_the_same_however_many_are_drawn_at_once(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(seed_of("chunks")).normal(0, 1, 60)
    values[7] = np.nan
    at_once = interval(values, 20, statistic)
    monkeypatch.setattr("foveate.eval.statistics._CHUNK", 60 * 7)
    assert interval(values, 20, statistic) == at_once
    assert interval(values, [3] * 20, statistic) == at_once


@pytest.mark.parametrize("is_padded", [True, False])
def test_prompts_may_differ_in_their_number_of_images(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_padded:
        monkeypatch.setattr("foveate.eval.statistics._PADDING", 0)
        monkeypatch.setattr("foveate.eval.statistics._CHUNK", 1)
    counts = np.array([1, 4, 2, 3])
    values = np.random.default_rng(seed_of("unequal")).normal(30, 4, counts.sum())
    found, tenth = interval(values, counts, "mean"), interval(values, counts, "p10")
    # The slow twin: lists of whole prompts.
    rng, prompts = np.random.default_rng(0), np.split(values, np.cumsum(counts)[:-1])
    drawn = [np.concatenate([prompts[i] for i in row]) for row in rng.integers(0, 4, (NUM_RESAMPLES, 4))]
    assert found is not None
    assert tenth is not None
    ends = np.percentile([one.mean() for one in drawn], (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx(ends)
    tenths = np.percentile([np.percentile(one, 10) for one in drawn], (2.5, 97.5))
    assert (tenth.low, tenth.high) == pytest.approx(tenths)
    values[0] = np.nan
    assert interval(values, counts) == interval(values[1:], counts[1:]), "a prompt without a value says nothing"
