"""A size that no schedule has: the nearest three are named."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.families.published import PUBLISHED
from foveate.families.spec import ModelSpec
from foveate.pipeline.call import resolve


def refusal(spec: ModelSpec, width: int, height: int) -> str:
    with pytest.raises(FoveateError) as raised:
        resolve("a cat", {"width": width, "height": height}, spec)
    return str(raised.value)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((1000, 1000), "1024x1024, 896x1120, 1120x896"),
        ((500, 500), "512x512, 448x560, 560x448"),
        ((1920, 1080), "1344x768, 1440x720, 1248x832"),
        ((100, 100), "256x256, 192x336, 336x192"),
    ],
)
def test_the_nearest_three_by_area_and_ratio(size: tuple[int, int], nearest: str) -> None:
    spec = PUBLISHED["infinity-2b"].spec
    total = len(spec.sizes())
    expected = f"size must be one of {nearest} (width x height; nearest of {total}), got {size[0]}x{size[1]}"
    assert refusal(spec, *size) == expected


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_no_other_size_is_nearer(width: int, height: int) -> None:
    spec = PUBLISHED["infinity-2b"].spec
    if (width, height) in spec.sizes():
        return

    def distance(size: tuple[int, int]) -> float:
        area = math.log(size[0] * size[1] / (width * height))
        return area**2 + math.log(size[0] / size[1] * height / width) ** 2

    found = [(int(w), int(h)) for w, h in re.findall(r"(\d+)x(\d+)", refusal(spec, width, height))][:3]
    limits = sorted(distance(size) for size in spec.sizes())[:3]
    assert [distance(size) for size in found] == pytest.approx(limits, abs=1e-9)


@pytest.mark.parametrize("size", [(0, -5), (10**30, 1)])
def test_any_number_is_refused_in_one_line(size: tuple[int, int]) -> None:
    assert len(re.findall(r"\d+x\d+", refusal(PUBLISHED["infinity-2b"].spec, *size))) <= 4


def test_all_are_named_where_there_are_no_more_than_three() -> None:
    spec = PUBLISHED["var-d16"].spec
    assert refusal(spec, 100, 100) == "size must be one of 256x256 (width x height), got 100x100"
    assert refusal(replace(spec, name="x"), 1, 1).startswith("size must be one of 256x256 (")
