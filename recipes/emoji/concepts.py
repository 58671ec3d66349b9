"""Reads what each emoji depicts: one concept per code point, with label, synonyms and keywords.

Labels, groups and tags come from emojibase-data; further names from its shortcodes, from emojilib and from
unicode-emoji-json. A name that belongs to two concepts is dropped, as a caption must point at one drawing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.emoji.captions import clean_phrases, rewrite_label
from recipes.emoji.packages import read_json

_SHORTCODE_FILES = ("emojibase", "github", "iamcal", "joypixels")
_MAX_KEYWORDS = 12

# Everyday names that the sources carry only among their keywords, or not at all, by label.
_EXTRA_SYNONYMS: dict[str, tuple[str, ...]] = {
    "rabbit": ("bunny", "hare"),
    "cat": ("kitten", "kitty"),
    "dog": ("puppy",),
    "crocodile": ("alligator",),
    "T-Rex": ("tyrannosaurus",),
    "turtle": ("tortoise",),
    "chicken": ("hen",),
    "shrimp": ("prawn",),
    "black bird": ("crow", "raven"),
    "front-facing baby chick": ("chick", "baby chicken"),
    "lady beetle": ("ladybird",),
    "rosette": ("orange flower",),
    "palm tree": ("palm",),
    "evergreen tree": ("fir tree", "pine tree"),
    "deciduous tree": ("leafy tree",),
    "mushroom": ("toadstool",),
    "hot pepper": ("chili pepper",),
    "bell pepper": ("green pepper", "capsicum"),
    "eggplant": ("aubergine",),
    "ear of corn": ("corn on the cob", "maize"),
    "cut of meat": ("steak",),
    "poultry leg": ("chicken drumstick", "chicken leg"),
    "hamburger": ("burger", "cheeseburger"),
    "pizza": ("slice of pizza", "pizza slice"),
    "french fries": ("chips",),
    "cooking": ("egg in a frying pan", "frying pan"),
    "doughnut": ("donut",),
    "cookie": ("chocolate chip cookie", "biscuit"),
    "shortcake": ("slice of cake",),
    "hot beverage": ("cup of coffee", "cup of tea"),
    "teacup without handle": ("cup of tea with a tea bag",),
    "beer mug": ("glass of beer",),
    "cocktail glass": ("martini",),
    "bottle with popping cork": ("champagne", "bottle of champagne"),
    "wine glass": ("glass of wine",),
    "cup with straw": ("soft drink",),
    "taxi": ("cab", "taxi cab"),
    "bus": ("coach",),
    "fire engine": ("fire truck",),
    "articulated lorry": ("semi truck",),
    "racing car": ("formula one car",),
    "motor scooter": ("moped", "vespa"),
    "locomotive": ("steam train",),
    "sailboat": ("sailing boat", "boat with a sail"),
    "passenger ship": ("ocean liner",),
    "flying saucer": ("UFO",),
    "fuel pump": ("gas pump", "petrol pump"),
    "luggage": ("suitcase",),
    "jack-o-lantern": ("halloween pumpkin", "carved pumpkin"),
    "wrapped gift": ("present",),
    "soccer ball": ("football ball",),
    "flying disc": ("frisbee",),
    "video game": ("game controller", "gamepad"),
    "game die": ("dice",),
    "teddy bear": ("stuffed bear",),
    "coat": ("jacket",),
    "backpack": ("rucksack",),
    "billed cap": ("baseball cap",),
    "gem stone": ("diamond", "jewel"),
    "ring": ("diamond ring",),
    "saxophone": ("sax",),
    "musical keyboard": ("piano keys",),
    "mobile phone": ("smartphone", "cell phone"),
    "television": ("TV", "TV set"),
    "magnifying glass tilted left": ("magnifying glass",),
    "flashlight": ("torch",),
    "bathtub": ("bath",),
    "bucket": ("pail",),
    "light bulb": ("lightbulb",),
    "camera": ("photo camera",),
}

# Shortcodes that do not name what is drawn.
_POOR_NAMES = frozenset(
    {
        "android",
        "bellhop",
        "birthday",
        "bullettrain front",
        "bullettrain side",
        "flipper",
        "gun",
        "iphone",
        "mag",
        "mega",
        "motorbike",
        "oil",
        "pistol",
        "womans flat shoe",
    }
)
_POOR_KEYWORDS = frozenset({"ass", "booze", "bottom", "butt", "instructment", "phallic", "vegatable", "chadder"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """What an emoji depicts, whatever its style; the names are as in `Drawing`."""

    code_point: str
    label: str
    group: str
    subgroup: str
    is_skin_tone: bool
    synonyms: tuple[str, ...]
    keywords: tuple[str, ...]


def code_point_key(hexadecimal: str) -> str:
    """Normalises a code point sequence: lower case, joined by "-", without the variation selector fe0f.

    Leading zeros stay: the 3-D package holds keycap 3 as 0033-20e3, the name that the maker's flat set has, and
    another drawing of it as 33-20e3.
    """
    return "-".join(part for part in hexadecimal.lower().split("-") if part != "fe0f")


def load_concepts(emojibase: Path, emojilib: Path, unicode_emoji: Path) -> dict[str, Concept]:
    """Reads all concepts that belong to a group, keyed by code point, in the order of Unicode.

    Args:
        emojibase: Tarball of emojibase-data.
        emojilib: Tarball of emojilib.
        unicode_emoji: Tarball of unicode-emoji-json.
    """
    entries = _entries(read_json(emojibase, "en/data.json"))
    names = _raw_names(entries, emojibase, unicode_emoji)
    words: dict[str, list[str]] = read_json(emojilib, "dist/emoji-en-US.json")
    meta = read_json(emojibase, "meta/groups.json")
    labels = {code_point: rewrite_label(entry["label"]) for code_point, (entry, _) in entries.items()}
    all_labels = frozenset(label.lower() for label in labels.values())
    shared = _shared(names)
    concepts: dict[str, Concept] = {}
    for code_point, (entry, is_skin_tone) in entries.items():
        label = labels[code_point]
        # A drawing of the whole animal is no "zebra face"; sets differ in what they draw, so the name goes.
        foreign = all_labels | shared | _POOR_NAMES | {f"{label.lower()} face"}
        synonyms = clean_phrases(names[code_point], label, foreign)
        known = all_labels | _POOR_KEYWORDS | {name.lower() for name in synonyms} | set(label.lower().split())
        tags = [*entry.get("tags", ()), *words.get(entry["emoji"], ())]
        concepts[code_point] = Concept(
            code_point=code_point,
            label=label,
            group=meta["groups"][str(entry["group"])],
            subgroup=meta["subgroups"][str(entry["subgroup"])],
            is_skin_tone=is_skin_tone,
            synonyms=synonyms,
            keywords=clean_phrases(tags, label, known)[:_MAX_KEYWORDS],
        )
    return concepts


def _entries(data: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Mapping[str, Any], bool]]:
    found: dict[str, tuple[Mapping[str, Any], bool]] = {}
    for entry in data:
        # Regional indicators have no group: they are halves of flags, not drawings.
        if "group" in entry:
            found[code_point_key(entry["hexcode"])] = (entry, False)
            for variant in entry.get("skins", ()):
                found[code_point_key(variant["hexcode"])] = ({**entry, **variant}, True)
    return found


def _raw_names(
    entries: Mapping[str, tuple[Mapping[str, Any], bool]], emojibase: Path, unicode_emoji: Path
) -> dict[str, list[str]]:
    names = {
        code_point: [] if is_skin_tone else list(_EXTRA_SYNONYMS.get(rewrite_label(entry["label"]), ()))
        for code_point, (entry, is_skin_tone) in entries.items()
    }
    by_emoji = read_json(unicode_emoji, "data-by-emoji.json")
    for code_point, (entry, is_skin_tone) in entries.items():
        if entry["emoji"] in by_emoji and not is_skin_tone:
            names[code_point].append(rewrite_label(by_emoji[entry["emoji"]]["name"]))
    for file in _SHORTCODE_FILES:
        for hexadecimal, codes in read_json(emojibase, f"en/shortcodes/{file}.json").items():
            code_point = code_point_key(hexadecimal)
            if code_point in names and not entries[code_point][1]:
                names[code_point] += [codes] if isinstance(codes, str) else codes
    return names


def _shared(names: Mapping[str, Sequence[str]]) -> frozenset[str]:
    counts = Counter(name for raw in names.values() for name in {one.replace("_", " ").lower() for one in raw})
    return frozenset(name for name, count in counts.items() if count > 1)
