"""Guidance and temperature are chosen by what the model draws, and the search takes nothing for a gain that is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.families.spec import Defaults
from foveate.pipeline.call import resolve
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji import sampling
from recipes.emoji.loop import PauseError
from recipes.emoji.sampling import SamplingSearch, ScoreBook, Setting, search


def silent(_: str) -> None:
    """Drops a line."""


START = Setting.flat(2.0, 1.0, 7)


def test_the_search_finds_the_best_pair_and_then_what_single_scales_want() -> None:
    def score(setting: Setting) -> np.ndarray:
        """Best at guidance 4 everywhere, and at temperature 0.5 but for the last scales, which want 0.8."""
        wanted = (0.5, 0.5, 0.5, 0.5, 0.5, 0.8, 0.8)
        off = sum(abs(w - 4.0) for w in setting.guidance) + sum(
            abs(t - best) for t, best in zip(setting.temperature, wanted, strict=True)
        )
        return 1 - off / 100 + np.linspace(0, 0.5, 20)

    found = search(score, START, SamplingSearch(factors=(0.6, 1.6)), silent)
    assert found.guidance == (4.0,) * 7
    assert found.temperature == (0.5,) * 5 + (0.8,) * 2


def test_gains_within_the_noise_change_nothing() -> None:
    tried: list[Setting] = []
    rng = np.random.default_rng(0)

    def score(setting: Setting) -> np.ndarray:
        tried.append(setting)
        return rng.random(50) + 0.001 * len(tried)

    options = SamplingSearch(guidance=(2.0, 3.0), temperatures=(0.5,), least_errors=4.0)
    assert search(score, START, options, silent) == START
    assert len(tried) == 1 + 2 + 3 * 2 * 2


def test_a_search_that_was_stopped_draws_nothing_twice(tmp_path: Path) -> None:
    drawn: list[str] = []
    left = [2]

    def score(setting: Setting) -> np.ndarray:
        drawn.append(str(setting))
        return np.full(4, setting.guidance[0]) + np.arange(4)

    def may_go_on() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PauseError("time is up")

    def book(weights: str) -> ScoreBook:
        return ScoreBook(path=tmp_path / "scores.json", weights=weights, may_go_on=may_go_on)

    options = SamplingSearch(guidance=(3.0, 4.0), temperatures=(0.5,), factors=())
    with pytest.raises(PauseError):
        search(book("a").kept(score, "x"), START, options, silent)
    left[0] = 1
    assert search(book("a").kept(score, "x"), START, options, silent).guidance == (4.0,) * 7
    assert len(drawn) == len(set(drawn)) == 3
    left[0] = 3
    search(book("b").kept(score, "x"), START, options, silent)
    assert len(drawn) == 6, "other weights generate anew"
    left[0] = 3
    search(book("b").kept(score, "y"), START, options, silent)
    assert len(drawn) == 9, "and so do other scenes"


def test_guidance_stays_at_least_one_and_every_scale_is_in_one_third() -> None:
    setting = Setting.flat(1.5, 0.5, 7)
    assert setting.changed("guidance", range(2, 4), 0.5).guidance == (1.5, 1.5, 1.0, 1.0, 1.5, 1.5, 1.5)
    for count in (2, 3, 7, 13):
        assert [scale for third in sampling._thirds(count) for scale in third] == list(range(count))


@pytest.mark.parametrize(
    "fields", [{"guidance": (0.5,)}, {"temperatures": (0.0,)}, {"factors": (-1.0,)}, {"prompts": 1}]
)
def test_bad_searches_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match="sampling needs"):
        SamplingSearch(**fields)


def test_ranks_count_the_scenes_that_are_as_near() -> None:
    real = np.eye(3, dtype=np.float32)
    drawn = np.array([[2.0, 0.5, 0.2], [0.9, 0.5, 0.7], [1.0, 0.0, 1.0]], dtype=np.float32)
    assert sampling.reciprocal_ranks(drawn, real).tolist() == pytest.approx([1, 1 / 3, 1 / 2]), "a tie is a loss"


def test_of_a_short_list_of_defaults_the_last_value_goes_on() -> None:
    spec = Pipeline.from_pretrained("emoji").model.spec
    spec = replace(spec, defaults=Defaults(guidance_scale=(3.0, 3.0, 2.0), temperature=(0.3, 0.5)))
    job = resolve("a red apple", {}, spec)
    assert job.guidance_scale == (3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert job.temperatures == (0.3, *(0.5,) * 6)
    with pytest.raises(FoveateError, match="needs one number or 7, one per scale, got 2"):
        resolve("a red apple", {"guidance_scale": [1.0, 2.0]}, spec)
