"""Lines of the report: verdicts on both sides of a target, and what is printed where nothing was measured."""

import pytest

from recipes.emoji.figures import COLUMNS, Figure


@pytest.mark.parametrize(
    ("value", "target", "lower", "verdict"),
    [
        (0.8, 0.8, False, "met"),
        (0.79, 0.8, False, "missed"),
        (20.0, 20.0, True, "met"),
        (20.1, 20.0, True, "missed"),
        (0.9, None, False, ""),
        (None, 0.8, False, ""),
    ],
)
def test_verdicts(value: float | None, target: float | None, lower: bool, verdict: str) -> None:
    assert Figure(name="x", value=value, target=target, lower_is_better=lower).verdict == verdict


def test_cells() -> None:
    share = Figure(name="a", value=0.256, ceiling=0.9, target=0.8)
    assert share.cells() == ("a", "26%", "90%", ">= 80%", "missed", "")
    distance = Figure(name="b", value=19.123456, target=20.0, is_share=False, lower_is_better=True, note="n")
    assert distance.cells() == ("b", "19.12", "-", "<= 20", "met", "n")
    assert Figure(name="c", value=None, note="one style").cells() == ("c", "-", "-", "-", "", "one style")
    assert len(share.cells()) == len(COLUMNS)
