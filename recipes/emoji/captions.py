"""Names drawings: rewrites Unicode labels to plain phrases and samples captions from them.

Everything here is a pure function of its arguments; randomness comes only through a numpy generator. Empty captions
(for guidance) and scenes of several drawings are the trainer's business.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STYLE_PHRASES: dict[str, str] = {
    "fluent-3d": "3D emoji",
    "fluent-flat": "flat vector",
    "noto": "Noto emoji",
    "noto-v1": "retro blob emoji",
    "twemoji": "Twemoji",
}

# Shares of the three kinds of caption; what is left is label and keywords.
_LABEL_SHARE = 0.60
_SYNONYM_SHARE = 0.25
_ARTICLE_SHARE = 0.50
_MAX_KEYWORDS_IN_CAPTION = 3
_MAX_LISTED_SYNONYMS = 3
_MAX_CAPTIONS = 12

# What people put around the name of a thing. Colours among the qualities teach that the thing outweighs them: a corpus
# of one drawing per concept cannot show two colours of it. Sizes are not among them: scenes show those.
QUALITIES = (
    "cute", "old", "new", "shiny", "pretty", "funny", "single", "nice", "typical",
    "red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "purple", "orange", "colourful",
)  # fmt: skip
BIG = ("big", "large", "huge", "giant")
SMALL = ("small", "little", "tiny", "mini")
SIZE_WORDS = frozenset({*BIG, *SMALL, "medium", "medium-small"})
"""A name that holds one of them gets no other size."""
SIDES = {"left": (0, -1), "right": (0, 1), "top": (-1, 0), "bottom": (1, 0)}
"""Which way (y, x) each side of an image lies."""
_FRAMES = (
    "{}", "a picture of {}", "a drawing of {}", "an icon of {}", "{} on a white background", "{} in the distance",
    "{} on the table", "{} in the garden", "{} at home", "{} outside", "{} by the sea", "{} in the city", "this is {}",
    "{} seen from the front", "{} for children", "I would like to see {}",
)  # fmt: skip
_PLAIN_SHARE = 0.4
NUM_FRAMED = 12
"""Framed captions of a drawing: about as many as it has short ones."""

# The phrase is in most captions of a corpus with several styles; with one style it says nothing new.
MULTI_STYLE_SHARE = 0.85
SINGLE_STYLE_SHARE = 0.30

# Head nouns that take no "a": masses, and names of things that exist once.
# fmt: off
_MASS_NOUNS = frozenset({
    "asparagus", "bacon", "badminton", "bamboo", "beer", "bowling", "boxing", "bread", "broccoli", "butter",
    "celery", "champagne", "chocolate", "clothing", "coffee", "cooking", "coral", "corn", "curry", "dna",
    "falafel", "fire", "fog", "food", "fruit", "fuji", "furniture", "garlic", "ginger", "grass", "green", "hair",
    "hockey", "honey", "ice", "jewelry", "kaaba", "lacrosse", "lettuce", "lightning", "liquid", "luggage", "maize",
    "mate", "meat", "milk", "money", "music", "oden", "paper", "pasta", "ping-pong", "pong", "popcorn", "rain",
    "ramen", "rice", "sake", "salt", "seafood", "skin", "snow", "soap", "spaghetti", "stew", "sugar", "sushi",
    "tea", "tennis", "thread", "toast", "tuna", "water", "wheat", "wood", "work", "yarn",
})
# fmt: on
# Ends in "s" yet is one thing.
_SINGULAR_IN_S = frozenset(
    {"abacus", "bus", "cactus", "hibiscus", "hippopotamus", "lotus", "minibus", "octopus", "rhinoceros"}
    | {"trolleybus", "tyrannosaurus", "walrus"}
)
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n)|ewe|eu|one\b|once\b|ufo|ukulele|u[- ]|use|ut[ei])", re.IGNORECASE)
_VOWEL_SOUND = re.compile(r"(?:[aeiou]|hour|honest|heir|x-ray|8\b|mp3)", re.IGNORECASE)
HEAD_END = re.compile(r"\s(?:of|with|on|in|and|without|over|behind|at|for|from|facing|showing|to)\s|,")
_NEEDS_THE = re.compile(
    r"^(?:United |Bahamas|Gambia|Netherlands|Philippines)|(?:Islands|Republic|Territor\w+|Emirates)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One image of the corpus and its names.

    Attributes:
        index: Row of `images.npy`.
        code_point: Hexadecimal code points joined by "-", lower case, without the variation selector fe0f.
        label: The plain English name.
        style: One of `STYLE_PHRASES`.
        group: Unicode group, such as "food-drink".
        subgroup: Unicode subgroup, such as "food-fruit".
        synonyms: Other names of the same thing; none names a second concept.
        keywords: Words that people look for it with.
        split: "train" or "test".
    """

    index: int
    code_point: str
    label: str
    style: str
    group: str
    subgroup: str
    synonyms: tuple[str, ...]
    keywords: tuple[str, ...]
    split: str


def rewrite_label(label: str) -> str:
    """Turns a Unicode label with a colon into a phrase: "flag: Japan" becomes "flag of Japan".

    Typographic apostrophes become straight ones; a label without a colon is otherwise unchanged.
    """
    plain = label.replace("\u2019", "'").strip()
    base, colon, rest = plain.partition(": ")
    if not colon:
        return plain
    parts = rest.split(", ")
    tones = [part for part in parts if part.endswith("skin tone")]
    others = [part for part in parts if part not in tones]
    if not others:
        return f"{base} with {_join(tones)}"
    if tones:
        bare = rewrite_label(f"{base}: {', '.join(others)}")
        more = bare.removeprefix(f"{base} with ")
        return f"{bare} with {_join(tones)}" if more == bare else f"{base} with {_join([*tones, more])}"
    people = _join([with_article(part) for part in others])
    by_base = {
        "flag": f"flag of the {rest}" if _NEEDS_THE.search(rest) else f"flag of {rest}",
        "keycap": f"keycap {rest}",
        "family": f"family of {people}",
        "kiss": f"kiss of {people}",
        "couple with heart": f"couple with heart, {people}",
    }
    by_rest = {"bald": f"bald {base}", "beard": f"{base} with a beard", "facing right": f"{base} facing right"}
    return by_base.get(base) or by_rest.get(rest) or f"{base} with {_join(others)}"


def with_article(phrase: str) -> str:
    """Puts "a" or "an" before a countable singular; plurals, masses and proper names stay as they are."""
    head = HEAD_END.split(phrase, maxsplit=1)[0].split()
    first, last = head[0], head[-1].lower()
    is_plural = last.endswith("s") and not last.endswith("ss") and last not in _SINGULAR_IN_S
    if is_plural or last in _MASS_NOUNS or first.lower() in {"a", "an", "the"} or _is_name(phrase, first):
        return phrase
    is_vowel = _VOWEL_SOUND.match(phrase) and not _CONSONANT_SOUND.match(phrase)
    return f"{'an' if is_vowel else 'a'} {phrase}"


def with_style(phrase: str, style: str) -> str:
    """Appends the phrase of a style: "red apple, 3D emoji"."""
    return f"{phrase}, {STYLE_PHRASES[style]}"


def caption(
    drawing: Drawing, rng: np.random.Generator, *, style_share: float = MULTI_STYLE_SHARE, place: str = ""
) -> str:
    """Draws one caption; never empty.

    Sixty percent are the label, 25 percent a synonym, the rest the label and one to three keywords. A drawing without
    synonyms or keywords falls back to its label. Half of the labels and synonyms carry an article.

    Args:
        drawing: What to name.
        rng: The only source of randomness.
        style_share: Share of captions with the style phrase, in [0, 1]; `Corpus.style_share` is the usual value.
        place: Where the thing is, such as "on a blue background"; follows the name.
    """
    kind = rng.random()
    phrase = drawing.label
    if _LABEL_SHARE <= kind < _LABEL_SHARE + _SYNONYM_SHARE and drawing.synonyms:
        phrase = drawing.synonyms[int(rng.integers(len(drawing.synonyms)))]
    if rng.random() < _ARTICLE_SHARE:
        phrase = with_article(phrase)
    if place:
        phrase = f"{phrase} {place}"
    if kind >= _LABEL_SHARE + _SYNONYM_SHARE and drawing.keywords:
        most = min(_MAX_KEYWORDS_IN_CAPTION, len(drawing.keywords))
        picked = rng.permutation(len(drawing.keywords))[: int(rng.integers(1, most + 1))]
        phrase = ", ".join([phrase, *(drawing.keywords[int(at)] for at in picked)])
    return with_style(phrase, drawing.style) if rng.random() < style_share else phrase


def all_captions(drawing: Drawing) -> list[str]:
    """Lists at most 12 captions of a drawing, best first, without repeats; the same on every call.

    The label bare, with an article and with the style phrase come first, then synonyms, then the label with one or two
    keywords. A trainer can encode them once and keep the text features.
    """
    label, named = drawing.label, with_article(drawing.label)
    found = [label, named, with_style(label, drawing.style), with_style(named, drawing.style)]
    for synonym in drawing.synonyms[:_MAX_LISTED_SYNONYMS]:
        found += [with_article(synonym), synonym]
    found += [", ".join([label, *words]) for words in _keyword_picks(drawing.keywords)]
    return list(dict.fromkeys(found))[:_MAX_CAPTIONS]


def framed_captions(drawing: Drawing, count: int = NUM_FRAMED) -> list[str]:
    """Lists `count` longer ways to ask for a drawing, the same on every call: "a picture of a small bus".

    A name, label or synonym, with a quality in front of it more often than not, inside a common frame.
    """
    rng = np.random.default_rng(drawing.index)
    names = (drawing.label, *drawing.synonyms)
    found = []
    for _ in range(count):
        name = names[int(rng.integers(len(names)))]
        quality = QUALITIES[int(rng.integers(len(QUALITIES)))]
        phrase = name if rng.random() < _PLAIN_SHARE else f"{quality} {name}"
        found.append(_FRAMES[int(rng.integers(len(_FRAMES)))].format(with_article(phrase)))
    return found


def clean_phrases(raw: Sequence[str], label: str, taken: frozenset[str]) -> tuple[str, ...]:
    """Keeps the raw names that are plain phrases, in order.

    Args:
        raw: Names, with underscores or without.
        label: The drawing's own label, which is left out.
        taken: Lower-case phrases that name something else, left out too.
    """
    kept: dict[str, str] = {}
    for name in raw:
        phrase = name.replace("_", " ").replace("\u2019", "'").strip()
        key = phrase.lower()
        is_plain = re.fullmatch(r"[A-Za-z][A-Za-z' -]+[A-Za-z]", phrase) is not None
        if is_plain and key not in taken and _bare(key) != _bare(label):
            kept.setdefault(_bare(key), phrase)
    return tuple(kept.values())


def _bare(phrase: str) -> str:
    return re.sub(r"[^a-z0-9]", "", phrase.lower())


def _keyword_picks(keywords: tuple[str, ...]) -> list[tuple[str, ...]]:
    picks = [keywords[:1], keywords[1:2], keywords[:2], keywords[2:3]]
    return [pick for pick in picks if pick]


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _is_name(phrase: str, first: str) -> bool:
    # "Tokyo tower" and "Statue of Liberty" exist once; "Christmas tree", "Japanese castle" and "T-Rex" do not.
    is_capital = first[0].isupper() and not re.match(r"(?:Christmas|Japanese|T-Rex|[A-Z]+\b)", phrase)
    return is_capital or phrase.lower().startswith("mount ")
