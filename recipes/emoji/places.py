"""Trains the position tagger (`conditioning.places`): which things of a prompt are where, and which are big or small.

The captions are made here, in more phrasings than the scenes have: what the tagger learns of "underneath" the image
model need not. Each knows the spans of its things. Axes: as in `conditioning.places`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from foveate.conditioning.minilm import TextEncoder
from foveate.conditioning.places import NUM_AXES, Places, PlacesConfig
from foveate.core.errors import FoveateError
from foveate.core.layers import init_weights
from recipes.emoji.captions import (
    BIG,
    QUALITIES,
    SIDES,
    SIZE_WORDS,
    SMALL,
    STYLE_PHRASES,
    Drawing,
    framed_captions,
    with_article,
)
from recipes.emoji.colours import BACKGROUNDS
from recipes.emoji.plurals import plural

T = TypeVar("T")
Span = tuple[int, int, tuple[int, int, int]]
"""First character, the one behind the last, and what the caption says along y, x and size, each -1, 0 or 1."""

# {a} is the left or upper thing, {b} the right or lower one. The first four are those of the scenes.
BESIDE = (
    "{a} to the left of {b}", "{b} to the right of {a}", "{a} to the left of {b}", "{b} to the right of {a}",
    "{a} left of {b}", "{b} right of {a}", "{a} on the left of {b}", "{b} on the right of {a}",
    "{a} on the left side of {b}", "{b} on the right side of {a}", "{a} is to the left of {b}",
    "{b} is to the right of {a}", "{a} on the left and {b} on the right", "{b} on the right and {a} on the left",
    "{a} on the left, {b} on the right", "on the left {a}, on the right {b}", "on the left {a} and on the right {b}",
    "on the right {b} and on the left {a}", "left: {a}, right: {b}", "{a} left, {b} right",
    "{a} with {b} to its right", "{b} with {a} to its left", "{a} and to the right of it {b}",
    "{b} and to the left of it {a}",
)  # fmt: skip
STACKED = (
    "{a} above {b}", "{b} below {a}", "{a} above {b}", "{b} below {a}", "{a} over {b}", "{b} under {a}",
    "{b} beneath {a}", "{b} underneath {a}", "{a} on top of {b}", "{a} is above {b}", "{b} is below {a}",
    "{a} is on top of {b}", "{b} is under {a}", "{a} at the top and {b} at the bottom",
    "{b} at the bottom and {a} at the top", "at the top {a}, at the bottom {b}", "at the bottom {b} and at the top {a}",
    "top: {a}, bottom: {b}", "{a} with {b} below it", "{b} with {a} above it", "{b} with {a} on top",
    "{a} with {b} underneath", "{a} and below it {b}", "{b} and above it {a}",
)  # fmt: skip
# {a} stands at the side of {side}; the first two are those of the scenes.
ALONE = (
    "{a} on the {side}", "{a} at the {side}", "{a} on the {side} side", "on the {side} {a}", "at the {side} {a}",
    "{a} in the {side} half", "{a} at the {side} edge", "{a} at the {side} of the picture", "{side}: {a}",
)  # fmt: skip
PLACELESS = (
    "{a} next to {b}", "{a} and {b}", "{a} beside {b}", "{a} with {b}", "{a} near {b}", "{a}, {b}",
    "{a} in front of {b}", "{a}", "a picture of {a}",
)  # fmt: skip

_PAIR_SHARE = 0.6
_ALONE_SHARE = 0.12
_FRAMED_SHARE = 0.3
_SIZE_SHARE = 0.25
_QUALITY_SHARE = 0.15
_SYNONYM_SHARE = 0.35
_PLURAL_SHARE = 0.1
_BARE_SHARE = 0.1
_BACKGROUND_SHARE = 0.4
_STYLE_SHARE = 0.1
_NUMBERS = ("two", "three", "four")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacesRecipe:
    """How the position tagger is trained: `steps` of `batch` new captions each, at a rate that falls to zero.

    Of no steps at all the bundled position tagger is kept.
    `strength` is the root mean square of a mark, as a share of that of the token features; the log's figure is taken on
    `checks` new captions.
    """

    steps: int = 3000
    batch: int = 64
    rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    strength: float = 1.0
    checks: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedCaption:
    """A caption, and where it puts its things and how big; nothing is said of characters outside the spans."""

    text: str
    spans: tuple[Span, ...]


def draw_placed(drawings: Sequence[Drawing], rng: np.random.Generator) -> PlacedCaption:
    """Draws a caption of one or two drawings; most give them places, some sizes."""
    kind = rng.random()
    if kind < _PAIR_SHARE:
        is_beside = rng.random() < 0.5
        return _filled(_one(BESIDE if is_beside else STACKED, rng), drawings, (0, -1) if is_beside else (-1, 0), rng)
    if kind < _PAIR_SHARE + _ALONE_SHARE:
        side = _one(tuple(SIDES), rng)
        return _filled(_one(ALONE, rng).replace("{side}", side), drawings, SIDES[side], rng)
    if rng.random() < _FRAMED_SHARE:
        return PlacedCaption(text=_one(framed_captions(_one(drawings, rng)), rng), spans=())
    return _filled(_one(PLACELESS, rng), drawings, (0, 0), rng)


def _filled(
    template: str, drawings: Sequence[Drawing], place: tuple[int, int], rng: np.random.Generator
) -> PlacedCaption:
    """Puts things into a template: {a} stands at the place, {b} opposite."""
    text, spans = "", []
    for part in re.split(r"(\{[ab]\})", template):
        if part not in {"{a}", "{b}"}:
            text += part
            continue
        name, size = _name(drawings, rng)
        sign = 1 if part == "{a}" else -1
        spans.append((len(text), len(text) + len(name), (sign * place[0], sign * place[1], size)))
        text += name
    if rng.random() < _BACKGROUND_SHARE:
        text += f" on {with_article(f'{_one(tuple(BACKGROUNDS), rng)} background')}"
    if rng.random() < _STYLE_SHARE:
        text += f", {_one(tuple(STYLE_PHRASES.values()), rng)}"
    return PlacedCaption(text=text, spans=tuple(spans))


def _name(drawings: Sequence[Drawing], rng: np.random.Generator) -> tuple[str, int]:
    """A name with what stands in front of it, and the size that this says."""
    drawing = _one(drawings, rng)
    phrase, size = drawing.label, 0
    if drawing.synonyms and rng.random() < _SYNONYM_SHARE:
        phrase = _one(drawing.synonyms, rng)
    many = plural(phrase)
    if many is not None and rng.random() < _PLURAL_SHARE:
        return f"{_one(_NUMBERS, rng)} {many}", 0
    if rng.random() < _QUALITY_SHARE:
        phrase = f"{_one(QUALITIES, rng)} {phrase}"
    # A small airplane is a kind of airplane: what a name says itself is no size.
    if rng.random() < _SIZE_SHARE and SIZE_WORDS.isdisjoint(phrase.lower().split()):
        size = 1 if rng.random() < 0.5 else -1
        phrase = f"{_one(BIG if size == 1 else SMALL, rng)} {phrase}"
    return (phrase if rng.random() < _BARE_SHARE else with_article(phrase)), size


def _one(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def places_of(encoder: TextEncoder, captions: Sequence[PlacedCaption]) -> Int[Tensor, "B T A"]:
    """The classes of all tokens along y, x and size, 0, 1 or 2; what stands at padding means nothing."""
    offsets_B = [encoder.tokenizer.encode(one.text).offsets for one in captions]
    place_BTA = torch.ones((len(captions), max(map(len, offsets_B)), NUM_AXES), dtype=torch.long)
    for row, (one, offsets) in enumerate(zip(captions, offsets_B, strict=True)):
        for first, end, place in one.spans:
            for token, (start, stop) in enumerate(offsets):
                if start >= first and first < stop <= end:
                    place_BTA[row, token] = torch.tensor(place) + 1
    return place_BTA


def teach_places(
    recipe: PlacesRecipe, encoder: TextEncoder, drawings: Sequence[Drawing], log: Callable[[str], None]
) -> Places:
    """Trains a position tagger from scratch.

    Args:
        recipe: How long and how fast.
        encoder: What it reads; left as it was.
        drawings: Whose names the captions hold.
        log: Receives a line now and then.

    Returns:
        The position tagger, in evaluation mode, on the device of the encoder.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = encoder.model
    device = model.embeddings.word_embeddings.weight.device
    places = Places(PlacesConfig(text_width=model.config.width)).to(device)
    init_weights(places)
    optimiser = torch.optim.AdamW(places.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        captions = [draw_placed(drawings, rng) for _ in range(recipe.batch)]
        ids_BT, mask_BT = encoder.padded([one.text for one in captions])
        with torch.no_grad():
            middle_BTE = model.states(ids_BT, mask_BT, places.config.tap)[-1]
        logits_BTAc = places.logits(middle_BTE, mask_BT)
        target_BTA = places_of(encoder, captions).to(device)
        loss = functional.cross_entropy(logits_BTAc[mask_BT].flatten(0, 1), target_BTA[mask_BT].flatten())
        share = step / recipe.steps
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / recipe.warmup_steps) * (1 - share)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            log(f"position tagger: step {step + 1} of {recipe.steps}  loss {loss.item():.4f}")
    ids_BT, mask_BT = encoder.padded([draw_placed(drawings, rng).text for _ in range(recipe.batch)])
    with torch.no_grad():
        rms = model(ids_BT, mask_BT)[mask_BT].square().mean().sqrt()
    direction_AE = torch.randn(NUM_AXES, model.config.width, generator=torch.Generator().manual_seed(recipe.seed)).to(
        device
    )
    direction_AE /= direction_AE.square().mean(1, keepdim=True).sqrt()
    places.direction_AE.data.copy_(direction_AE * rms * recipe.strength)
    return places.requires_grad_(requires_grad=False).eval()


def placed_share(encoder: TextEncoder, drawings: Sequence[Drawing], count: int) -> float:
    """Share of new captions of which every token gets its classes."""
    rng = np.random.default_rng([count, 1])
    captions = [draw_placed(drawings, rng) for _ in range(count)]
    parts = [captions[first : first + 64] for first in range(0, count, 64)]
    return float(torch.cat([places_right(encoder, part) for part in parts]).mean())


@torch.no_grad()
def places_right(encoder: TextEncoder, captions: Sequence[PlacedCaption]) -> Float[Tensor, " B"]:
    """Whether every token of a caption gets its classes, 1 or 0 per caption.

    Raises:
        FoveateError: If the encoder has no position tagger.
    """
    places = encoder.places
    if places is None:
        raise FoveateError("encoder must have a position tagger, got one without")
    ids_BT, mask_BT = encoder.padded([one.text for one in captions])
    found_BTA = places.logits(encoder.model.states(ids_BT, mask_BT, places.config.tap)[-1], mask_BT).argmax(-1)
    wrong_BT = (found_BTA != places_of(encoder, captions).to(found_BTA.device)).any(-1) & mask_BT
    return (~wrong_BT.any(1)).float().cpu()
