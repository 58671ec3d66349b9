"""Composition checks on pictures whose content is known, and on ones that must fail them."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.colours import BACKGROUNDS
from recipes.emoji.composition import background_of, connected, crop, is_in_order, side_of, size_of, things_of


def picture(*squares: tuple[int, int, int], background: str = "white", side: int = 256) -> np.ndarray:
    """Blue-green squares (top, left, extent) on a colour, with a little noise."""
    image = np.empty((side, side, 3))
    image[:] = BACKGROUNDS[background]
    for top, left, extent in squares:
        image[top : top + extent, left : left + extent] = (10, 120, 130)
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", list(BACKGROUNDS))
def test_backgrounds_are_recognised(name: str) -> None:
    assert background_of(picture((60, 60, 130), background=name)) == name
    assert background_of(picture((0, 100, 60), background=name)) == name, "a thing may touch the border"
    large = picture((20, 20, 216), background=name)
    assert background_of(large) == name, "a thing may cover more than half"
    assert len(things_of(large)) == 1


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_things_are_counted_and_specks_are_not(number: int) -> None:
    image = picture(*((100, 8 + 62 * i, 50) for i in range(number)), background="yellow")
    image[20:23, 20:23] = 0
    assert len(things_of(image)) == number


def test_a_loose_piece_is_no_thing() -> None:
    assert len(things_of(picture((80, 80, 100), (20, 20, 30)))) == 1
    assert len(things_of(picture((80, 80, 100), (10, 10, 60)))) == 2


def test_boxes_and_centres() -> None:
    large, small = things_of(picture((128, 128, 100), (10, 40, 64)))
    assert large.box == pytest.approx((0.5, 0.5, 0.891, 0.891), abs=0.01)
    assert small.centre == pytest.approx((42 / 256, 72 / 256), abs=0.01)
    assert small.area == pytest.approx((64 / 256) ** 2, rel=0.05)


def test_crops_are_squares_around_a_thing() -> None:
    image = picture((0, 200, 56), background="pink")
    cut = crop(image, things_of(image)[0])
    assert cut.shape[0] == cut.shape[1] == pytest.approx(62, abs=2)
    assert np.abs(cut.astype(int) - (10, 120, 130)).max(-1).min() < 10
    assert np.abs(cut[0, -1].astype(int) - BACKGROUNDS["pink"]).max() < 10, "what lies outside is background"


@pytest.mark.parametrize(
    ("squares", "size", "side"),
    [
        ((), None, None),
        (((80, 80, 90),), "small", None),
        (((60, 60, 128),), None, None),
        (((20, 20, 200),), "big", None),
        (((100, 10, 60),), "small", "left"),
        (((90, 180, 60),), "small", "right"),
        (((10, 80, 60),), "small", "top"),
        (((180, 110, 60),), "small", "bottom"),
        (((100, 10, 60), (100, 190, 60)), "big", None),
    ],
)
def test_size_and_side_are_those_of_all_things_together(
    squares: tuple[tuple[int, int, int], ...], size: str | None, side: str | None
) -> None:
    image = picture(*squares, background="mint")
    assert (size_of(image), side_of(image)) == (size, side)


@pytest.mark.parametrize("axis", ["x", "y"])
def test_order_follows_centres_and_the_better_pairing(axis: str) -> None:
    at = ((100, 10, 80), (100, 150, 80)) if axis == "x" else ((10, 100, 80), (150, 100, 80))
    before, after = sorted(things_of(picture(*at)), key=lambda thing: thing.centre)
    fits = np.array([[0.9, 0.1], [0.5, 0.4]])
    assert is_in_order((before, after), fits, axis)
    assert not is_in_order((before, after), fits[:, ::-1], axis)
    assert not is_in_order((after, before), fits, axis)


def test_connected_against_a_flood() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        mask = rng.random((24, 24)) < 0.55
        label = connected(mask)
        assert ((label > 0) == mask).all()
        seen = np.zeros_like(mask)
        regions = 0
        for start in zip(*np.nonzero(mask), strict=True):
            if seen[start]:
                continue
            regions += 1
            heap = [start]
            while heap:
                y, x = heap.pop()
                if 0 <= y < 24 and 0 <= x < 24 and mask[y, x] and not seen[y, x]:
                    seen[y, x] = True
                    assert label[y, x] == label[start]
                    heap += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert regions == len(np.unique(label[label > 0]))


def test_only_squares_are_checked() -> None:
    with pytest.raises(FoveateError, match="squares"):
        things_of(np.zeros((256, 128, 3), dtype=np.uint8))
