"""The style probe on features that differ along one direction, and on ones that do not differ."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.style import fit_style_probe


def features(shift: float, count: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, 12))
    x[:, 3] += shift
    return x


def test_a_style_that_differs_is_recognised_and_one_that_does_not_is_not() -> None:
    for shift, least, most in ((6.0, 0.97, 1.0), (0.0, 0.3, 0.7)):
        rows = np.concatenate([features(0.0, 200, 1), features(shift, 200, 2)])
        probe = fit_style_probe(rows, ["noto"] * 200 + ["twemoji"] * 200)
        fresh = np.concatenate([features(0.0, 200, 3), features(shift, 200, 4)])
        assert least <= probe.accuracy(fresh, ["noto"] * 200 + ["twemoji"] * 200) <= most


def test_one_style_is_refused() -> None:
    with pytest.raises(FoveateError, match="two styles"):
        fit_style_probe(features(0.0, 5, 0), ["noto"] * 5)
