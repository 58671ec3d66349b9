"""Paraphrases: the bundled ones are whole, and what was trained on is left out."""

from recipes.emoji.paraphrases import Paraphrase, bundled_paraphrases, unseen


def test_the_bundled_ones_are_whole_and_distinct() -> None:
    found = bundled_paraphrases()
    assert len({one.text for one in found}) == len(found) == 20
    assert Paraphrase(text="the king of the jungle", label="lion") in found
    assert all(one.text.strip() and one.label.strip() for one in found)


def test_what_was_trained_on_is_left_out() -> None:
    cab = Paraphrase(text="A yellow cab", label="taxi")
    king = Paraphrase(text="the king of the jungle", label="lion")
    both = (cab, king)
    assert unseen(both, {"taxi", "lion"}, set()) == both
    assert unseen(both, {"taxi", "lion"}, {"a yellow cab"}) == (king,)
    assert unseen(both, {"taxi"}, set()) == (cab,)
