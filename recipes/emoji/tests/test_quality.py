"""Nearest drawing and kernel distance on toys whose answers are known."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from foveate.core.errors import FoveateError
from recipes.emoji.features import Judge, features, load_network
from recipes.emoji.quality import kid, nearest


def drawings(seed: int) -> np.ndarray:
    """Four white images: a red disc, a blue square, green stripes, a black cross; noise depends on the seed."""
    rng = np.random.default_rng(seed)
    images = np.full((4, 64, 64, 3), 255, np.uint8)
    y, x = np.mgrid[:64, :64]
    images[0, (y - 32) ** 2 + (x - 32) ** 2 < 400] = (220, 30, 30)
    images[1, 12:52, 12:52] = (30, 40, 220)
    images[2, :, (np.arange(64) // 6) % 2 == 0] = (20, 160, 40)
    images[3, 28:36] = images[3, :, 28:36] = 0
    return np.clip(images + rng.normal(0, 4, images.shape), 0, 255).astype(np.uint8)


def test_nearest_equals_plain_twin() -> None:
    rng = np.random.default_rng(0)
    rows, corpus = rng.normal(size=(20, 7)), rng.normal(size=(31, 7)) * rng.uniform(0.1, 9, (31, 1))
    expected = []
    for row in rows:
        cosines = [float(row @ other) / (np.linalg.norm(row) * np.linalg.norm(other)) for other in corpus]
        expected.append(cosines.index(max(cosines)))
    assert nearest(rows, corpus).tolist() == expected
    # By inner product alone, without the norms, the answer would differ.
    assert (rows @ corpus.T).argmax(axis=1).tolist() != expected


def test_nearest_refuses_an_empty_corpus() -> None:
    with pytest.raises(FoveateError, match="at least one corpus row"):
        nearest(np.ones((2, 3)), np.ones((0, 3)))


def test_features_do_not_depend_on_batch_and_see_content() -> None:
    network = load_network()
    images = drawings(0)
    rows = features(images, network=network)
    assert rows.shape == (4, 1280)
    assert rows.dtype == np.float32
    assert rows.min() >= 0
    assert rows.max() <= 6
    np.testing.assert_allclose(features(images, network=network, batch_size=3), rows, atol=1e-3)
    np.testing.assert_array_equal(nearest(rows[::-1], features(drawings(1), network=network)), [3, 2, 1, 0])


@pytest.mark.parametrize(("judge", "side"), [("lite0", 224), ("lite2", 260)])
def test_features_agree_with_the_package_classifier(judge: Judge, side: int) -> None:
    network = load_network(judge=judge)
    images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    planes = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255.0).float()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = network((planes - mean[:, None, None]) / std[:, None, None])
        ours = network._fc(torch.from_numpy(features(images, network=network)))
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), atol=1e-3)


def test_kid_equals_plain_twin_and_torchmetrics() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(0.3, 1, (6, 5)), rng.normal(0, 1, (6, 5))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [kernel(a[i], a[j]) for a in (one, other) for i in range(6) for j in range(6) if i != j]
    across = [kernel(a, b) for a in one for b in other]
    assert kid(one, other) == pytest.approx(2 * np.mean(within) - 2 * np.mean(across))
    assert kid(one, other) == pytest.approx(float(poly_mmd(torch.from_numpy(one), torch.from_numpy(other))))


def test_kid_takes_sets_of_different_size_and_tells_distributions_apart() -> None:
    rng = np.random.default_rng(4)
    same = kid(rng.normal(0, 1, (300, 8)), rng.normal(0, 1, (400, 8)))
    shifted = kid(rng.normal(0.5, 1, (300, 8)), rng.normal(0, 1, (400, 8)))
    assert abs(same) < 0.1 < shifted
    with pytest.raises(FoveateError, match="two rows"):
        kid(np.ones((1, 8)), np.ones((5, 8)))
