"""Text match on toys whose answers are known."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from foveate.core.errors import FoveateError
from recipes.emoji.heads import TextMatch, TextMatchTraining, train_text_match


def identity_match() -> TextMatch:
    """Heads that compare the first three features as they are."""
    eye = np.eye(3, 5, dtype=np.float32)
    zeros = np.zeros(3, np.float32)
    return TextMatch(image_weight=eye, image_bias=zeros, text_weight=eye, text_bias=zeros)


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
