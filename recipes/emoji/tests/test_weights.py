"""Draw weights: groups, the cap on skin tones, and names that fit nothing."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.captions import Drawing
from recipes.emoji.weights import DrawWeights, drawing_weights


def drawing(label: str, code_point: str, group: str, subgroup: str) -> Drawing:
    return Drawing(
        index=0, code_point=code_point, label=label, style="noto", group=group, subgroup=subgroup, synonyms=(),
        keywords=(), split="train",
    )  # fmt: skip


PEAR = drawing("pear", "1f350", "food-drink", "food-fruit")
FLAG = drawing("flag of Japan", "1f1ef-1f1f5", "flags", "country-flag")
HAND = drawing("waving hand with dark skin tone", "1f44b-1f3ff", "people-body", "hand-fingers-open")


def test_factors_multiply() -> None:
    config = DrawWeights.from_dict({"groups": {"flags": 0.5}, "subgroups": {"food-fruit": 2}, "labels": {"pear": 3}})
    np.testing.assert_allclose(drawing_weights([PEAR, FLAG], config), [6 / 6.5, 0.5 / 6.5])
    np.testing.assert_allclose(drawing_weights([PEAR, FLAG], DrawWeights()), [1 / 1.3, 0.3 / 1.3])


def test_skin_tones_are_capped_and_never_raised() -> None:
    many = drawing_weights([PEAR, *[HAND] * 9], DrawWeights())
    assert many[1:].sum() == pytest.approx(0.15)
    assert many.sum() == pytest.approx(1)
    few = drawing_weights([*[PEAR] * 19, HAND], DrawWeights())
    assert few[-1] == pytest.approx(0.05)
    np.testing.assert_allclose(drawing_weights([HAND, HAND], DrawWeights()), 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group": {}}, "group must be a mapping groups"),
        ({"groups": {"flags": -1}}, "'flags' must be at least 0, got -1"),
        ({"groups": {"flags": "few"}}, "flags must be a number, got 'few'"),
        ({"labels": 2}, "weights: labels must be"),
        ({"skin_tone_share": 1.0}, "skin_tone_share must be in"),
        ({"subgroups": {"food-friut": 2}}, "got 'food-friut'"),
        ({"groups": {"flags": 0, "food-drink": 0}}, "leave none"),
    ],
)
def test_config_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        drawing_weights([PEAR, FLAG], DrawWeights.from_dict(values))
