"""Composes drawings into scenes whose captions are exactly true, and renders them.

Axes: B scenes, N images of a corpus, K backgrounds in the order of `BACKGROUNDS`, Y = X pixels. A scene is a value:
what stands where, on which colour, and the words for it. Each drawing has a square of its own; squares never overlap,
so what a caption says of left, above, numbers and sizes follows from them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import FoveateError
from recipes.emoji.captions import (
    MULTI_STYLE_SHARE,
    SIDES,
    SINGLE_STYLE_SHARE,
    SIZE_WORDS,
    Drawing,
    caption,
    framed_captions,
    with_article,
    with_style,
)
from recipes.emoji.colours import BACKGROUNDS
from recipes.emoji.plurals import plural

Kind = Literal["single", "beside", "stacked", "count", "sized"]
Square = tuple[float, float, float]
"""Centre y, centre x and side, as shares of the image's side."""

_WHOLE: Square = (0.5, 0.5, 1.0)
_MARGIN = 0.02
_GAP = 0.03
_SYNONYM_SHARE = 0.3
_NAMED_WHITE_SHARE = 0.15
_NEXT_TO_SHARE = 0.1
_SIZED_PAIR_SHARE = 0.6
_SIZED_ORDER_SHARE = 0.5
_FOUR_IN_ROW_SHARE = 0.2
_SHIFT = 0.03
_ACROSS = 0.12
_MAX_TRIES = 2000
_NUMBERS = {2: "two", 3: "three", 4: "four"}
# Their art is no thing that one counts, or its name is no noun.
_UNCOUNTED = frozenset({"symbols", "flags", "time", "place-map"})


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """How scenes are drawn; shares lie in [0, 1], and what the four kinds leave is single drawings.

    Attributes:
        white_share: Share of white backgrounds; the other colours are equally likely.
        beside_share: Share of two things side by side.
        stacked_share: Share of two things one above the other.
        count_share: Share of two to four of one thing.
        sized_share: Share of things that the caption calls big or small.
        centred_share: Share of single drawings that fill the image as the art does; others are smaller.
        placed_share: Share of these others that stand at a side that the caption names; the rest stand anywhere.
        framed_share: Share of longer captions among those of centred drawings on white, see `framed_captions`.
        style_share: Share of captions with the style phrase; None is the rule of `Corpus.style_share`.
        least_contrast: Least CIELAB distance of a drawing's rim to its background, if contrasts are given.
    """

    white_share: float = 0.4
    beside_share: float = 0.15
    stacked_share: float = 0.10
    count_share: float = 0.10
    sized_share: float = 0.10
    centred_share: float = 0.6
    placed_share: float = 0.5
    framed_share: float = 0.2
    style_share: float | None = None
    least_contrast: float = 15.0

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            FoveateError: If a share is out of range, or the kinds are more than all.
        """
        kinds = (self.beside_share, self.stacked_share, self.count_share, self.sized_share)
        style = 0.0 if self.style_share is None else self.style_share
        for share in (*kinds, self.white_share, self.centred_share, self.placed_share, self.framed_share, style):
            if not 0 <= share <= 1:
                raise FoveateError(f"shares of a scene must be in [0, 1], got {share}")
        if sum(kinds) > 1 + 1e-9:
            raise FoveateError(f"shares of the kinds of scenes must add up to at most 1, got {sum(kinds)}")

    def draw_kind(self, rng: np.random.Generator) -> Kind:
        """Draws the kind of a scene."""
        shares = np.array([self.beside_share, self.stacked_share, self.count_share, self.sized_share])
        kinds: tuple[Kind, ...] = ("beside", "stacked", "count", "sized", "single")
        return kinds[int(np.searchsorted(np.cumsum(shares), rng.random(), side="right"))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A drawing in a scene.

    Attributes:
        drawing: Row of `images.npy`.
        centre: Where the middle of its square is, (y, x) in [0, 1] from the upper left.
        size: Side of its square, as a share of the image's side.
    """

    drawing: int
    centre: tuple[float, float]
    size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """An image to be rendered, and what it is called.

    Attributes:
        background: A key of `BACKGROUNDS`.
        things: What is on it; the squares do not overlap.
        caption: True of the image; never empty.
        kind: How it is composed.
        style: The style of all its things.
    """

    background: str
    things: tuple[Placed, ...]
    caption: str
    kind: Kind
    style: str


def draw_scene(
    drawings: Sequence[Drawing],
    rng: np.random.Generator,
    config: SceneConfig,
    kind: Kind | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
    contrast_NK: Float[np.ndarray, "N K"] | None = None,
) -> Scene:
    """Draws one scene.

    Args:
        drawings: What to choose from, one split of a corpus.
        rng: The only source of randomness.
        config: Shares.
        kind: What to compose; None draws it.
        weights: How often each of `drawings` is chosen, of any sum; None chooses all alike. See `drawing_weights`.
        contrast_NK: CIELAB distance of each image of the corpus to each background, see `rim_contrast`; a background
            that a drawing would vanish on is not drawn. None allows all.

    Raises:
        FoveateError: If no drawing suits the kind, for instance no two of one style.
    """
    chosen = kind if kind is not None else config.draw_kind(rng)
    cast = _Cast(drawings=drawings, cumulated=None if weights is None else np.cumsum(weights), rng=rng)
    things, squares, words = _COMPOSERS[chosen](cast, config)
    background = _draw_background([thing.index for thing in things], rng, config, contrast_NK)
    is_silent = background == "white" and rng.random() >= _NAMED_WHITE_SHARE
    place = "" if is_silent else f"on {with_article(f'{background} background')}"
    style_share = _style_share(drawings) if config.style_share is None else config.style_share
    is_plain = chosen == "single" and squares[0] == _WHOLE and background == "white"
    if is_plain and rng.random() < config.framed_share:
        framed = framed_captions(things[0])
        text = framed[int(rng.integers(len(framed)))]
    elif not words:
        text = caption(things[0], rng, style_share=style_share, place=place)
    else:
        text = f"{words} {place}" if place else words
        text = with_style(text, things[0].style) if rng.random() < style_share else text
    placed = tuple(
        Placed(drawing=thing.index, centre=(y, x), size=size)
        for thing, (y, x, size) in zip(things, squares, strict=True)
    )
    return Scene(background=background, things=placed, caption=text, kind=chosen, style=things[0].style)


def render(
    scenes: Sequence[Scene], images_NYXc: UInt8[Tensor, "N Y X 4"], size: tuple[int, int]
) -> Float[Tensor, "B 3 Yo Xo"]:
    """Renders scenes on the device of the images: premultiplied, antialiased, laid over the background.

    Things of one size are resized together, in float32; nothing is read back from the device. In an oblong image sizes
    are shares of the shorter side, and what a caption says of places stays true.

    Args:
        scenes: What to draw.
        images_NYXc: All images of the corpus, straight alpha.
        size: Height and width of the images in pixels.

    Returns:
        RGB in [-1, 1].
    """
    device = images_NYXc.device
    colours = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32).to(device) / 255
    canvas_BcYX = colours[:, :, None, None].repeat(1, 1, *size)
    by_size: dict[int, list[tuple[int, Placed]]] = {}
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            by_size.setdefault(max(1, round(thing.size * min(size))), []).append((row, thing))
    for side, group in by_size.items():
        index = torch.tensor([thing.drawing for _, thing in group]).to(device)
        rgba_ncYX = images_NYXc[index].permute(0, 3, 1, 2).contiguous().float() / 255
        rgba_ncYX[:, :3] *= rgba_ncYX[:, 3:]
        if rgba_ncYX.shape[-1] != side:
            rgba_ncYX = functional.interpolate(rgba_ncYX, (side, side), mode="bilinear", antialias=True)
        shown_ncYX, through_ncYX = rgba_ncYX[:, :3], 1 - rgba_ncYX[:, 3:]
        for at, (row, thing) in enumerate(group):
            y, x = (_corner(middle, side, length) for middle, length in zip(thing.centre, size, strict=True))
            canvas_BcYX[row, :, y : y + side, x : x + side].mul_(through_ncYX[at]).add_(shown_ncYX[at])
    return canvas_BcYX.mul_(2).sub_(1)


def _corner(middle: float, side: int, length: int) -> int:
    return min(max(round(middle * length - side / 2), 0), length - side)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cast:
    """Whom a composer may choose from."""

    drawings: Sequence[Drawing]
    cumulated: Float[np.ndarray, " n"] | None
    rng: np.random.Generator

    def pick(self, suits: Callable[[Drawing], bool]) -> Drawing:
        """Draws by weight until one suits; sets of a fit size would cost a pass over the corpus for every scene."""
        for _ in range(_MAX_TRIES):
            if self.cumulated is None:
                at = int(self.rng.integers(len(self.drawings)))
            else:
                at = int(np.searchsorted(self.cumulated, self.rng.random() * self.cumulated[-1], side="right"))
            if suits(self.drawings[at]):
                return self.drawings[at]
        raise FoveateError(f"drawings must hold what the scene needs, got {len(self.drawings)} of which none suits")

    def pair(self, suits: Callable[[Drawing], bool]) -> tuple[Drawing, Drawing]:
        """Draws two different things of one style."""
        first = self.pick(suits)
        return first, self.pick(lambda one: one.style == first.style and one.label != first.label and suits(one))

    def name(self, drawing: Drawing, quality: str = "") -> str:
        """Names a drawing with its article."""
        phrase = drawing.label
        if drawing.synonyms and self.rng.random() < _SYNONYM_SHARE:
            phrase = drawing.synonyms[int(self.rng.integers(len(drawing.synonyms)))]
        return with_article(f"{quality} {phrase}" if quality else phrase)


_Composed = tuple[Sequence[Drawing], Sequence[Square], str]


def _single(cast: _Cast, config: SceneConfig) -> _Composed:
    thing = cast.pick(lambda _: True)
    rng = cast.rng
    if rng.random() < config.centred_share:
        return [thing], [_WHOLE], ""
    if rng.random() >= config.placed_share or not _is_plain(thing):
        return [thing], [_anywhere(rng.uniform(0.5, 0.95), rng)], ""
    side, (y, x) = tuple(SIDES.items())[int(rng.integers(len(SIDES)))]
    size = float(rng.uniform(0.4, 0.55))
    outward = 0.5 - _MARGIN - size / 2 - float(rng.uniform(0, _GAP))
    across = float(rng.uniform(-_ACROSS, _ACROSS))
    square = (0.5 + (y * outward if y else across), 0.5 + (x * outward if x else across), size)
    return [thing], [square], f"{cast.name(thing)} {'on' if x else 'at'} the {side}"


def _beside(cast: _Cast, _: SceneConfig) -> _Composed:
    left, right = cast.pair(_is_plain)
    squares = _in_line(cast.rng.uniform(0.36, 0.45, 2), cast.rng)
    a, b = cast.name(left), cast.name(right)
    kind = cast.rng.random()
    if kind < _NEXT_TO_SHARE:
        words = f"{a} next to {b}" if cast.rng.random() < 0.5 else f"{b} next to {a}"
    else:
        words = _in_order(a, b, cast.rng)
    return [left, right], squares, words


def _stacked(cast: _Cast, _: SceneConfig) -> _Composed:
    upper, lower = cast.pair(_is_plain)
    squares = [(x, y, size) for y, x, size in _in_line(cast.rng.uniform(0.36, 0.45, 2), cast.rng)]
    a, b = cast.name(upper), cast.name(lower)
    return [upper, lower], squares, f"{a} above {b}" if cast.rng.random() < 0.5 else f"{b} below {a}"


def _count(cast: _Cast, _: SceneConfig) -> _Composed:
    rng = cast.rng
    thing = cast.pick(_is_countable)
    names = [name for name in map(plural, thing.synonyms) if name is not None]
    name = plural(thing.label)
    if names and rng.random() < _SYNONYM_SHARE:
        name = names[int(rng.integers(len(names)))]
    number = int(rng.integers(2, 5))
    is_block = number == 4 and rng.random() >= _FOUR_IN_ROW_SHARE
    columns = 2 if is_block else number
    return [thing] * number, _grid(number // columns, columns, rng), f"{_NUMBERS[number]} {name}"


def _sized(cast: _Cast, _: SceneConfig) -> _Composed:
    rng = cast.rng
    if rng.random() >= _SIZED_PAIR_SHARE:
        thing = cast.pick(_is_sizable)
        is_big = rng.random() < 0.5
        size = rng.uniform(0.86, 0.96) if is_big else rng.uniform(0.28, 0.38)
        return [thing], [_anywhere(size, rng)], cast.name(thing, "big" if is_big else "small")
    big, small = cast.pair(_is_sizable)
    sizes = np.array([rng.uniform(0.55, 0.62), rng.uniform(0.22, 0.3)])
    is_big_left = rng.random() < 0.5
    squares = _in_line(sizes if is_big_left else sizes[::-1], rng)
    a, b = cast.name(big, "big"), cast.name(small, "small")
    if rng.random() < _SIZED_ORDER_SHARE:
        words = _in_order(a, b, rng) if is_big_left else _in_order(b, a, rng)
    else:
        words = f"{a} and {b}" if rng.random() < 0.5 else f"{b} and {a}"
    return [big, small], squares if is_big_left else squares[::-1], words


def _in_order(left: str, right: str, rng: np.random.Generator) -> str:
    return f"{left} to the left of {right}" if rng.random() < 0.5 else f"{right} to the right of {left}"


_COMPOSERS: dict[Kind, Callable[[_Cast, SceneConfig], _Composed]] = {
    "single": _single,
    "beside": _beside,
    "stacked": _stacked,
    "count": _count,
    "sized": _sized,
}


def _anywhere(size: float, rng: np.random.Generator) -> Square:
    edge = _MARGIN + size / 2
    return float(rng.uniform(edge, 1 - edge)), float(rng.uniform(edge, 1 - edge)), float(size)


def _in_line(sizes: Float[np.ndarray, " n"], rng: np.random.Generator) -> list[Square]:
    """Places squares from left to right with random gaps, about one height."""
    slack = 1 - 2 * _MARGIN - float(sizes.sum()) - _GAP * (len(sizes) - 1)
    before = np.cumsum(rng.dirichlet(np.ones(len(sizes) + 1)))[:-1] * slack
    starts = _MARGIN + before + np.concatenate([[0.0], np.cumsum(sizes + _GAP)[:-1]])
    height = rng.uniform(0.38, 0.62)
    squares = []
    for start, size in zip(starts, sizes, strict=True):
        edge = _MARGIN + size / 2
        y = np.clip(height + rng.uniform(-_SHIFT, _SHIFT), edge, 1 - edge)
        squares.append((float(y), float(start + size / 2), float(size)))
    return squares


def _grid(rows: int, columns: int, rng: np.random.Generator) -> list[Square]:
    """Places equal squares in the cells of a grid, each a little off its middle."""
    cell = (1 - 2 * _MARGIN) / columns
    size = float(rng.uniform(0.8, 0.96) * (cell - _GAP))
    play = (cell - _GAP - size) / 2
    free = (1 - 2 * _MARGIN - rows * cell) / 2
    top = _MARGIN + free + rng.uniform(-0.4, 0.4) * free
    shifts = rng.uniform(-play, play, (rows, columns, 2))
    return [
        (
            float(top + cell * (row + 0.5) + shifts[row, column, 0]),
            float(_MARGIN + cell * (column + 0.5) + shifts[row, column, 1]),
            size,
        )
        for row in range(rows)
        for column in range(columns)
    ]


def _is_plain(drawing: Drawing) -> bool:
    # A list of people inside a longer phrase would be read with the rest of it.
    return "," not in drawing.label


def _is_sizable(drawing: Drawing) -> bool:
    words = " ".join([drawing.label, *drawing.synonyms]).lower().split()
    # "A small rice" is not said.
    return _is_plain(drawing) and SIZE_WORDS.isdisjoint(words) and with_article(drawing.label) != drawing.label


def _is_countable(drawing: Drawing) -> bool:
    return not {drawing.group, drawing.subgroup} & _UNCOUNTED and plural(drawing.label) is not None


def _style_share(drawings: Sequence[Drawing]) -> float:
    # From the end: a corpus lists one style after the other, so the first look decides nearly always.
    first = drawings[0].style
    return MULTI_STYLE_SHARE if any(one.style != first for one in reversed(drawings)) else SINGLE_STYLE_SHARE


def _draw_background(
    rows: Sequence[int], rng: np.random.Generator, config: SceneConfig, contrast_NK: Float[np.ndarray, "N K"] | None
) -> str:
    names = list(BACKGROUNDS)
    least_K = np.full(len(names), np.inf) if contrast_NK is None else contrast_NK[list(rows)].min(0)
    allowed = [name for name, least in zip(names, least_K, strict=True) if least >= config.least_contrast]
    wants_white = rng.random() < config.white_share
    if wants_white and "white" in allowed:
        return "white"
    colours = [name for name in allowed if name != "white"]
    if not colours:
        # Nothing sets it off enough: the best there is.
        return names[int(np.argmax(least_K))]
    return colours[int(rng.integers(len(colours)))]
