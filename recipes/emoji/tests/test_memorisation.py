"""Nearest training drawings: against a plain loop, and on copies and on strangers."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.memorisation import COPY_DB, copied_share, nearest_neighbours, thumbnail_psnr


def test_neighbours_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    rows, drawings = rng.normal(size=(15, 6)), rng.normal(size=(22, 6)) * rng.uniform(0.1, 9, (22, 1))
    own = rng.permutation(22)[:15]
    for excluded in (None, own):
        found = nearest_neighbours(rows, drawings, excluded)
        for i, row in enumerate(rows):
            cosines = [float(row @ one) / float(np.linalg.norm(row) * np.linalg.norm(one)) for one in drawings]
            if excluded is not None:
                cosines[excluded[i]] = -2.0
            assert found.index[i] == int(np.argmax(cosines))
            assert found.cosine[i] == pytest.approx(max(cosines))


def test_a_drawing_does_not_find_itself() -> None:
    drawings = np.random.default_rng(1).normal(size=(9, 5))
    assert nearest_neighbours(drawings, drawings).index.tolist() == list(range(9))
    assert not (nearest_neighbours(drawings, drawings, np.arange(9)).index == np.arange(9)).any()
    with pytest.raises(FoveateError, match="needs one to find"):
        nearest_neighbours(drawings[:1], drawings[:1], np.arange(1))


def test_fine_texture_is_no_difference_and_another_drawing_is() -> None:
    rng = np.random.default_rng(2)
    coarse = rng.integers(60, 196, (3, 64, 64, 3))
    drawings = coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)
    # A checker of pixels averages out at a quarter of the size.
    checker = 40 * (np.indices((256, 256)).sum(0) % 2 * 2 - 1)[None, :, :, None]
    textured = (drawings + checker).astype(np.uint8)
    near, far = thumbnail_psnr(textured, drawings), thumbnail_psnr(textured, drawings[[1, 2, 0]])
    assert near.min() > 50
    assert far.max() < COPY_DB
    assert copied_share(np.concatenate([near, far])) == 0.5


def test_the_limit_itself_is_a_copy() -> None:
    assert copied_share(np.array([COPY_DB, COPY_DB - 0.01, 5.0, 90.0])) == 0.5
