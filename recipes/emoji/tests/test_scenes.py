"""Scenes: captions that are true by geometry, clear squares, and rendering against a plain compositor."""

import re

import numpy as np
import pytest
import torch

from foveate.core.errors import FoveateError
from recipes.emoji.captions import STYLE_PHRASES, Drawing
from recipes.emoji.colours import BACKGROUNDS, cielab
from recipes.emoji.composition import side_at
from recipes.emoji.contrast import rim_contrast
from recipes.emoji.plurals import plural
from recipes.emoji.scenes import Kind, Placed, Scene, SceneConfig, draw_scene, render

NAMES = ("cat", "dog", "apple", "box of mice", "bread", "cherries", "couple, a man and a boy", "large square")
DRAWINGS = tuple(
    Drawing(
        index=at, code_point=f"{at:x}", label=name, style=style, group="toys", subgroup="toy", synonyms=(),
        keywords=(), split="train",
    )
    for at, (style, name) in enumerate((style, name) for style in ("noto", "twemoji") for name in NAMES)
)  # fmt: skip
PLACE = re.compile(r"(?: on an? (?P<ground>[a-z ]+) background)?(?:, (?P<style>[\w ]+))?$")


def scenes_of(kind: Kind | None, count: int = 300, **config: float) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [draw_scene(DRAWINGS, rng, SceneConfig(**config), kind=kind) for _ in range(count)]


def words_of(scene: Scene) -> str:
    """The caption without background and style, both of which are checked."""
    found = PLACE.search(scene.caption)
    assert found is not None
    ground, style = found["ground"], found["style"]
    assert ground == scene.background or (ground is None and scene.background == "white")
    assert style in {None, STYLE_PHRASES[scene.style]}
    return scene.caption[: found.start()]


def name_of(thing: Placed) -> str:
    return DRAWINGS[thing.drawing].label


@pytest.mark.parametrize("kind", ["single", "beside", "stacked", "count", "sized"])
def test_things_are_apart_inside_and_of_one_style(kind: Kind) -> None:
    for scene in scenes_of(kind):
        assert scene.kind == kind
        assert {DRAWINGS[thing.drawing].style for thing in scene.things} == {scene.style}
        for at, one in enumerate(scene.things):
            margin = min(*one.centre, *(1 - c for c in one.centre)) - one.size / 2
            assert margin >= 0.02 - 1e-9 or (kind == "single" and one.size == 1 and one.centre == (0.5, 0.5))
            for other in scene.things[:at]:
                apart = max(abs(a - b) for a, b in zip(one.centre, other.centre, strict=True))
                assert apart - (one.size + other.size) / 2 >= 0.03 - 1e-9


@pytest.mark.parametrize(
    ("kind", "axis", "before", "behind"),
    [("beside", 1, "to the left of", "to the right of"), ("stacked", 0, "above", "below")],
)
def test_left_means_left_and_above_means_above(kind: Kind, axis: int, before: str, behind: str) -> None:
    seen = set()
    for scene in scenes_of(kind):
        first, second = sorted(scene.things, key=lambda thing: thing.centre[axis])
        found = re.fullmatch(rf"(?:an? )?(.+?) ({before}|{behind}|next to) (?:an? )?(.+)", words_of(scene))
        assert found is not None
        a, relation, b = found.groups()
        seen.add(relation)
        assert {a, b} == {name_of(first), name_of(second)}
        assert relation == "next to" or (a == name_of(first)) == (relation == before)
        across = 1 - axis
        assert second.centre[axis] - first.centre[axis] > 3 * abs(second.centre[across] - first.centre[across])
        assert "," not in a + b
    assert seen == {before, behind} | ({"next to"} if kind == "beside" else set())


def test_numbers_are_what_is_there() -> None:
    numbers = {"two": 2, "three": 3, "four": 4}
    seen = set()
    for scene in scenes_of("count"):
        number, name = words_of(scene).split(" ", maxsplit=1)
        assert len(scene.things) == numbers[number]
        assert name in {"cats", "dogs", "apples", "boxes of mice", "large squares"}
        assert {plural(name_of(thing)) for thing in scene.things} == {name}
        assert len({thing.size for thing in scene.things}) == 1
        seen.add(number)
    assert seen == set(numbers)


def test_big_is_much_bigger_than_small() -> None:
    seen = set()
    for scene in scenes_of("sized"):
        sizes = {name_of(thing): thing.size for thing in scene.things}
        parts = re.split(r" (and|to the left of|to the right of) ", words_of(scene))
        called = {part.split(" ", 2)[2]: part.split(" ", 2)[1] for part in parts[::2]}
        assert called.keys() == sizes.keys()
        if len(called) == 2:
            big, small = (next(name for name in called if called[name] == word) for word in ("big", "small"))
            assert sizes[big] > 1.8 * sizes[small]
            x = {name_of(thing): thing.centre[1] for thing in scene.things}
            first, second = called
            assert parts[1] == "and" or (x[first] < x[second]) == (parts[1] == "to the left of")
            seen.add(parts[1])
        else:
            ((name, word),) = called.items()
            assert sizes[name] > 0.8 if word == "big" else sizes[name] < 0.4
    assert seen == {"and", "to the left of", "to the right of"}


SIDE = re.compile(r"(?:an? )?(.+) (?:on|at) the (left|right|top|bottom)(?! of)")


def test_a_side_that_is_named_is_where_the_thing_stands() -> None:
    seen = set()
    for scene in scenes_of("single", centred_share=0.0, placed_share=1.0):
        found = SIDE.match(scene.caption)
        if found is None:
            assert "," in name_of(scene.things[0]), "inside a list it would be read with the last one"
            continue
        assert found[1] == name_of(scene.things[0])
        assert side_at(scene.things[0].centre) == found[2]
        seen.add(found[2])
    assert seen == {"left", "right", "top", "bottom"}
    placed = [SIDE.match(one.caption) for one in scenes_of("single", 1000, centred_share=0.5, placed_share=0.4)]
    assert np.mean([found is not None for found in placed]) == pytest.approx(0.2 * 7 / 8, abs=0.04)


def test_the_generator_and_the_shares_decide() -> None:
    assert scenes_of(None) == scenes_of(None)
    many = scenes_of(None, 4000, style_share=0.5)
    for kind, share in {"single": 0.55, "beside": 0.15, "stacked": 0.1, "count": 0.1, "sized": 0.1}.items():
        assert np.mean([scene.kind == kind for scene in many]) == pytest.approx(share, abs=0.03)
    white = [scene for scene in many if scene.background == "white"]
    assert len(white) / len(many) == pytest.approx(0.4, abs=0.03)
    assert np.mean(["white" in scene.caption for scene in white]) == pytest.approx(0.15, abs=0.03)
    assert {scene.background for scene in many} == set(BACKGROUNDS)
    singles = [scene for scene in many if scene.kind == "single"]
    assert np.mean([scene.things[0].size == 1 for scene in singles]) == pytest.approx(0.6, abs=0.04)
    phrases = tuple(STYLE_PHRASES.values())
    assert np.mean([scene.caption.endswith(phrases) for scene in many]) == pytest.approx(0.5, abs=0.03)


def test_weights_and_contrast_are_kept() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([float(one.label == "cat") for one in DRAWINGS])
    contrast = np.full((len(DRAWINGS), len(BACKGROUNDS)), 50.0)
    contrast[:, :-2] = 3.0
    made = [draw_scene(DRAWINGS, rng, SceneConfig(), "single", weights, contrast) for _ in range(100)]
    assert {DRAWINGS[scene.things[0].drawing].label for scene in made} == {"cat"}
    assert {scene.background for scene in made} == set(list(BACKGROUNDS)[-2:])
    contrast[:] = np.arange(len(BACKGROUNDS))
    assert draw_scene(DRAWINGS, rng, SceneConfig(), "single", None, contrast).background == list(BACKGROUNDS)[-1]


def test_what_cannot_be_composed_is_refused() -> None:
    rng = np.random.default_rng(0)
    cases: dict[Kind, tuple[Drawing, ...]]
    cases = {"beside": DRAWINGS[:1], "count": DRAWINGS[4:6], "sized": DRAWINGS[4:5]}
    for kind, drawings in cases.items():
        with pytest.raises(FoveateError, match="none suits"):
            draw_scene(drawings, rng, SceneConfig(), kind)
    with pytest.raises(FoveateError, match="in \\[0, 1\\], got 1.5"):
        SceneConfig(white_share=1.5)
    with pytest.raises(FoveateError, match="at most 1"):
        SceneConfig(beside_share=0.5, stacked_share=0.6)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("apple", "apples"), ("box", "boxes"), ("strawberry", "strawberries"), ("donkey", "donkeys"),
        ("wolf", "wolves"), ("knife", "knives"), ("chef", "chefs"), ("tomato", "tomatoes"), ("piano", "pianos"),
        ("mouse", "mice"), ("sheep", "sheep"), ("jellyfish", "jellyfish"), ("snowman", "snowmen"), ("bus", "buses"),
        ("slice of cake", "slices of cake"), ("woman pilot", "women pilots"), ("man dancing", "men dancing"),
        ("face with tears of joy", "faces with tears of joy"), ("face blowing a kiss", "faces blowing a kiss"),
        ("bed", "beds"), ("bread", None), ("cherries", None), ("Tokyo tower", None), ("two o'clock", None),
        ("bow and arrow", None), ("rolling on the floor laughing", None), ("men holding hands", None),
    ],
)  # fmt: skip
def test_plurals(phrase: str, expected: str | None) -> None:
    assert plural(phrase) == expected


def plain_render(scene: Scene, images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The slow twin of `render`: one thing at a time in float64, resized by weights that are written out."""
    canvas = np.tile(np.array(BACKGROUNDS[scene.background]) / 255, (*size, 1))
    for thing in scene.things:
        straight = images[thing.drawing].astype(np.float64) / 255
        image = np.concatenate([straight[..., :3] * straight[..., 3:], straight[..., 3:]], axis=-1)
        side = round(thing.size * min(size))
        weights = np.array([triangle(out, side, len(image)) for out in range(side)])
        small = np.einsum("ay,bx,yxc->abc", weights, weights, image)
        top, left = (round(middle * length - side / 2) for middle, length in zip(thing.centre, size, strict=True))
        for y in range(side):
            for x in range(side):
                pixel = canvas[top + y, left + x]
                canvas[top + y, left + x] = small[y, x, :3] + pixel * (1 - small[y, x, 3])
    return canvas.transpose(2, 0, 1) * 2 - 1


def triangle(out: int, length: int, source: int) -> np.ndarray:
    """Weights of the source pixels in one pixel of the result: a triangle as wide as two pixels of the coarser side."""
    scale = source / length
    reach = max(scale, 1.0)
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - (out + 0.5) * scale) / reach)
    return np.asarray(weights / weights.sum())


def test_render_equals_the_plain_compositor() -> None:
    rng = np.random.default_rng()
    images = rng.integers(0, 256, (len(DRAWINGS), 24, 24, 4), dtype=np.uint8)
    scenes = [draw_scene(DRAWINGS, rng, SceneConfig()) for _ in range(12)]
    for size in ((24, 24), (48, 48), (36, 24), (24, 40)):
        pixels = render(scenes, torch.from_numpy(images), size)
        for got, scene in zip(pixels, scenes, strict=True):
            np.testing.assert_allclose(got.numpy(), plain_render(scene, images, size), atol=1e-5)


def test_things_of_an_oblong_scene_neither_overlap_nor_leave_it() -> None:
    rng = np.random.default_rng()
    images = np.full((len(DRAWINGS), 8, 8, 4), 255, dtype=np.uint8)
    for kind in ("beside", "stacked", "count", "sized"):
        scenes = [draw_scene(DRAWINGS, rng, SceneConfig(white_share=0.0), kind=kind) for _ in range(20)]
        for size in ((60, 80), (80, 60)):
            white = (render(scenes, torch.from_numpy(images), size) > 0.999).all(1).sum((1, 2))
            whole = [sum(round(thing.size * 60) ** 2 for thing in scene.things) for scene in scenes]
            assert white.tolist() == whole


def test_background_colours_lie_apart() -> None:
    colours = cielab(np.array(list(BACKGROUNDS.values()), dtype=np.float64))
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() >= 20


def test_cielab_has_its_published_values() -> None:
    made = cielab(np.array([[255.0, 255, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]]))
    expected = np.array([[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0]])
    np.testing.assert_allclose(made, expected, atol=0.05)


def test_contrast_is_that_of_the_rim() -> None:
    image = np.zeros((32, 32, 4), dtype=np.uint8)
    image[4:28, 4:28] = (*BACKGROUNDS["red"], 255)
    image[8:24, 8:24] = (255, 255, 255, 255)
    empty = np.zeros_like(image)
    contrast = rim_contrast(np.stack([image, empty]))
    names = list(BACKGROUNDS)
    assert contrast[0, names.index("red")] == 0
    red_white = cielab(np.array([BACKGROUNDS["red"], BACKGROUNDS["white"]], dtype=np.float64))
    assert contrast[0, names.index("white")] == pytest.approx(np.linalg.norm(red_white[0] - red_white[1]))
    assert not contrast[1].any()
