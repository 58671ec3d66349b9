"""The position tagger: captions know where their things are, and a trained tagger finds it."""

import re
from dataclasses import replace

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from recipes.emoji.captions import BIG, SMALL, Drawing
from recipes.emoji.places import (
    ALONE,
    BESIDE,
    PLACELESS,
    STACKED,
    PlacedCaption,
    PlacesRecipe,
    draw_placed,
    placed_share,
    places_of,
    places_right,
    teach_places,
)
from recipes.emoji.texts import bundled_encoder

PLACES = {"left": (0, -1), "right": (0, 1), "top": (-1, 0), "bottom": (1, 0)}
NAMES = ("apple", "cat", "dog", "tree", "car", "guitar", "banana", "horse", "boat", "mushroom", "key", "drum")


def drawings() -> list[Drawing]:
    return [
        Drawing(
            index=index, code_point=str(index), label=name, style="fluent-3d", group="g", subgroup="s", synonyms=(),
            keywords=(), split="train",
        )
        for index, name in enumerate(NAMES)
    ]  # fmt: skip


def test_every_template_has_its_things() -> None:
    for template in (*BESIDE, *STACKED):
        assert {"{a}", "{b}"} == set(re.findall(r"\{.\}", template)), template
    for template in ALONE:
        assert {"{a}", "{side}"} == set(re.findall(r"\{\w+\}", template)), template
    assert all("{a}" in template for template in PLACELESS)


def test_spans_are_the_things_and_signs_oppose() -> None:
    rng = np.random.default_rng(0)
    kinds, sizes = set(), set()
    for _ in range(400):
        one = draw_placed(drawings(), rng)
        for first, end, (_, _, size) in one.spans:
            name = one.text[first:end]
            assert any(own in name for own in NAMES), one
            assert one.text[:first] == "" or one.text[first - 1] == " "
            assert size == (not set(BIG).isdisjoint(name.split())) - (not set(SMALL).isdisjoint(name.split()))
            sizes.add(size)
        if len(one.spans) == 2:
            (y, x), (v, u) = (place[:2] for _, _, place in one.spans)
            assert (y, x) == (-v, -u)
            kinds.add((len(one.spans), abs(y), abs(x)))
        elif one.spans:
            y, x = one.spans[0][2][:2]
            named = [place for side, place in PLACES.items() if re.search(rf"\b{side}\b", one.text)]
            assert [(y, x)] == (named or [(0, 0)]), one
            kinds.add((1, y, x))
    assert kinds == {(2, 0, 1), (2, 1, 0), (2, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, -1), (1, 1, 0), (1, -1, 0)}
    assert sizes == {-1, 0, 1}


def test_a_size_inside_of_a_name_is_no_size() -> None:
    rng = np.random.default_rng(0)
    planes = [replace(one, label="small airplane") for one in drawings()[:2]]
    spans = [span for _ in range(200) for span in draw_placed(planes, rng).spans]
    assert {size for _, _, (_, _, size) in spans} == {0}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a cat to the left of a dog", (0, -1)),
        ("a cat to the right of a dog", (0, 1)),
        ("a cat left, a dog right", (0, -1)),
        ("a cat above a dog", (-1, 0)),
        ("a cat below a dog", (1, 0)),
    ],
)
def test_templates_say_what_they_mean(text: str, place: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    drawn = (draw_placed(drawings()[1:3], rng) for _ in range(40_000))
    first, second = next(sorted(one.spans) for one in drawn if one.text == text)
    assert text[first[0] : first[1]] == "a cat"
    assert first[2] == (*place, 0)
    assert second[2] == (-place[0], -place[1], 0)


def test_tokens_of_a_span_get_its_place() -> None:
    one = PlacedCaption(text="a cat above a toy guitar", spans=((0, 5, (-1, 0, 0)), (12, 24, (1, 0, -1))))
    place_TA = places_of(bundled_encoder(), [one])[0] - 1
    # [CLS] a cat above a toy guitar [SEP]
    assert place_TA[:, 0].tolist() == [0, -1, -1, 0, 1, 1, 1, 0]
    assert not place_TA[:, 1].any()
    assert place_TA[:, 2].tolist() == [0, 0, 0, 0, -1, -1, -1, 0]


@pytest.mark.soak
def test_a_reader_learns_and_the_same_recipe_gives_the_same_one() -> None:
    encoder = replace(bundled_encoder(), places=None)
    recipe = PlacesRecipe(steps=60, batch=16, rate=2e-3, warmup_steps=10)
    lines: list[str] = []
    few = replace(encoder, places=teach_places(replace(recipe, steps=5), encoder, drawings(), lines.append))
    taught = replace(encoder, places=teach_places(recipe, encoder, drawings(), lines.append))
    again = teach_places(replace(recipe, steps=5), encoder, drawings(), lines.append)
    assert taught.places is not None
    assert few.places is not None
    assert all((w == again.state_dict()[name]).all() for name, w in few.places.state_dict().items())
    assert placed_share(taught, drawings(), count=64) > placed_share(few, drawings(), count=64)
    length = taught.places.direction_AE.square().mean(1).sqrt()
    rms = encoder.encode(["a cat to the left of a dog"])[0][1:].square().mean().sqrt()
    assert length.min() > 0.5 * rms
    assert length.max() < 2 * rms


def test_an_encoder_without_places_cannot_be_judged() -> None:
    with pytest.raises(FoveateError, match="must have a position tagger"):
        places_right(replace(bundled_encoder(), places=None), [PlacedCaption(text="a cat", spans=())])
