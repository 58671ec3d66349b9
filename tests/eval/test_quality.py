"""Nearest drawing, kernel distance and text match on toys whose answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torchmetrics.image.kid import poly_mmd

from foveate.core.errors import FoveateError
from foveate.eval.features import features, load_network
from foveate.eval.quality import TextMatch, TextMatchTraining, kid, nearest, train_text_match


def drawings(seed: int) -> np.ndarray:
    """Four white pictures: a red disc, a blue square, green stripes, a black cross; noise depends on the seed."""
    rng = np.random.default_rng(seed)
    images = np.full((4, 64, 64, 3), 255, np.uint8)
    y, x = np.mgrid[:64, :64]
    images[0, (y - 32) ** 2 + (x - 32) ** 2 < 400] = (220, 30, 30)
    images[1, 12:52, 12:52] = (30, 40, 220)
    images[2, :, (np.arange(64) // 6) % 2 == 0] = (20, 160, 40)
    images[3, 28:36] = images[3, :, 28:36] = 0
    return np.clip(images + rng.normal(0, 4, images.shape), 0, 255).astype(np.uint8)


def identity_match() -> TextMatch:
    """Heads that compare the first three features as they are."""
    eye = np.eye(3, 5, dtype=np.float32)
    zeros = np.zeros(3, np.float32)
    return TextMatch(image_weight=eye, image_bias=zeros, text_weight=eye, text_bias=zeros)


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


def test_features_agree_with_the_package_classifier() -> None:
    network = load_network()
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
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


def test_r_at_1_on_a_toy() -> None:
    match = identity_match()
    texts = np.eye(3, 5)
    images = np.array([[9.0, 1, 0, 0, 0], [0, 0.1, 0, 7, 7], [5, 0, 4, 0, 0]])
    # The third image is nearest to the first text.
    assert match.r_at_1(images, texts) == pytest.approx(2 / 3)
    assert match.r_at_1(images, texts, np.array([0, 1, 0])) == 1.0
    assert match.r_at_1(images, texts, np.array([1, 0, 1])) == 0.0


def test_r_at_1_counts_ties_as_misses() -> None:
    match = identity_match()
    assert match.r_at_1(np.ones((2, 5)), np.ones((2, 5))) == 0.0


def test_r_at_1_refuses_what_does_not_fit() -> None:
    match = identity_match()
    with pytest.raises(FoveateError, match="two texts"):
        match.r_at_1(np.ones((1, 5)), np.ones((1, 5)))
    with pytest.raises(FoveateError, match="each image needs one"):
        match.r_at_1(np.ones((3, 5)), np.ones((2, 5)))


def test_training_transfers_to_unseen_images_and_is_reproducible(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    concepts = rng.normal(size=(40, 12))
    images_of, texts_of = rng.normal(size=(12, 1280)), rng.normal(size=(12, 384))
    # Far from zero, so that a lost mean of the standardisation shows.
    texts = (concepts @ texts_of + 50).astype(np.float32)
    ids = np.repeat(np.arange(40), 3)
    images = (concepts[ids] @ images_of + rng.normal(size=(120, 1280)) + 50).astype(np.float32)
    unseen = (concepts @ images_of + rng.normal(size=(40, 1280)) + 50).astype(np.float32)
    settings = TextMatchTraining(num_steps=40, batch_size=32)
    match = train_text_match(images, texts, ids, settings=settings)
    assert match.r_at_1(unseen, texts) > 0.9
    assert match.r_at_1(unseen, texts[::-1]) < 0.2

    again = train_text_match(images, texts, ids, settings=settings)
    np.testing.assert_array_equal(match.image_weight, again.image_weight)

    match.save(tmp_path / "new" / "heads.safetensors")
    loaded = TextMatch.load(tmp_path / "new" / "heads.safetensors")
    assert loaded.image_weight.dtype == np.float32
    np.testing.assert_allclose(loaded.similarity(unseen, texts), match.similarity(unseen, texts), atol=5e-3)


def test_several_texts_of_a_concept_are_all_used() -> None:
    rng = np.random.default_rng(6)
    images = np.repeat(rng.normal(size=(8, 20)), 2, axis=0).astype(np.float32)
    texts = rng.normal(size=(16, 10)).astype(np.float32)
    ids = np.repeat(np.arange(8), 2)
    settings = TextMatchTraining(num_steps=150, batch_size=8, feature_dropout=0.0)
    match = train_text_match(images, texts, ids, text_concept_ids=ids, settings=settings)
    nearest_text = match.similarity(images, texts).argsort(axis=1)[:, -2:]
    assert [sorted(row) for row in nearest_text.tolist()] == [[2 * concept, 2 * concept + 1] for concept in ids]


def test_training_refuses_ids_that_do_not_pair_up() -> None:
    rows = np.ones((3, 4), np.float32)
    with pytest.raises((FoveateError, TypeError)):
        train_text_match(rows, rows, np.array([0, 1]))
    with pytest.raises(FoveateError, match="two concepts"):
        train_text_match(rows, rows, np.array([0, 0, 7]))
    with pytest.raises(FoveateError, match="temperature"):
        TextMatchTraining(temperature=0.0)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="cannot read text-match heads"):
        TextMatch.load(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FoveateError, match="cannot read text-match heads"):
        TextMatch.load(tmp_path / "bad.safetensors")
    save_file({"weight": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(FoveateError, match="does not hold text-match heads"):
        TextMatch.load(tmp_path / "other.safetensors")


def test_bundled_heads_fit_the_features() -> None:
    match = TextMatch.bundled()
    assert match.image_weight.shape == (256, 1280)
    assert match.text_weight.shape == (256, 384)
