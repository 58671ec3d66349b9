"""Bounds on figures: how they are written, for whom they are, and when they hold."""

import pytest

from foveate.core.errors import FoveateError
from foveate.eval.bounds import FigureBound


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ssim.p10 >= 0.88", (None, "ssim.p10", ">=", 0.88)),
        ("n<5", (None, "n", "<", 5)),
        ("flip.max <= .5", (None, "flip.max", "<=", 0.5)),
        ("psnr.mean.low > -1e-3", (None, "psnr.mean.low", ">", -0.001)),
        ("speedup.end_to_end.p10 < 1", (None, "speedup.end_to_end.p10", "<", 1)),
        ("skip-scales:count=2 psnr.min == 100", ("skip-scales:count=2", "psnr.min", "==", 100)),
        ("skip_scales|drop-branch psnr.min > 3", ("skip-scales|drop-branch", "psnr.min", ">", 3)),
    ],
)
def test_bounds_as_they_are_written(text: str, parts: tuple[object, ...]) -> None:
    bound = FigureBound.parse(text)
    assert (bound.policy, bound.figure, bound.comparison, bound.limit) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ssim is low", "is written like"),
        ("ssim.p10 >= many", "is written like"),
        ("beauty > 1", "no figure 'beauty'"),
        ("n.low > 1", r"no figure 'n\.low'"),
        ("skip-scale psnr.mean > 1", "did you mean skip-scales"),
    ],
)
def test_what_is_no_bound(text: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        FigureBound.parse(text)


def test_figures_of_judges_can_be_bounded() -> None:
    assert FigureBound.parse("match.mean.low > 1", ["match.mean"]).is_interval
    with pytest.raises(FoveateError, match=r"no figure 'match\.mean'"):
        FigureBound.parse("match.mean > 1")


def test_how_far_a_bound_is_from_holding() -> None:
    bound = FigureBound.parse("psnr.mean >= 30")
    assert bound.violation({"psnr.mean": 27.5}) == 2.5
    assert bound.violation({"psnr.mean": 31.0}) == -1
    assert FigureBound.parse("psnr.mean > 30").violation({"psnr.mean": 30.0}) > 0
    assert FigureBound.parse("flip.max <= 0.25").violation({"flip.max": 0.5}) == 0.25
    with pytest.raises(FoveateError, match=r"psnr\.mean was not measured"):
        bound.holds({})
    with pytest.raises(FoveateError, match="an interval needs two prompts or more"):
        FigureBound.parse("psnr.mean.low > 1").holds({"psnr.mean.low": float("nan")})
