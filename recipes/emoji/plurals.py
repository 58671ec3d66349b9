"""Plurals of the corpus' names, for captions that count: "apple" becomes "apples", "slice of cake" "slices of cake".

Only names that can be counted have one here. Masses, names of one thing, words that are plural already and phrases
whose head is in doubt have none: a caption that is never written is never wrong.
"""

import re

from recipes.emoji.captions import HEAD_END, with_article

_IRREGULAR = {
    "child": "children", "die": "dice", "foot": "feet", "goose": "geese", "man": "men", "mouse": "mice", "ox": "oxen",
    "person": "people", "tooth": "teeth", "woman": "women", "quiz": "quizzes", "bus": "buses", "minibus": "minibuses",
}  # fmt: skip
_UNCHANGED = frozenset({"aircraft", "bison", "deer", "moose", "salmon", "sheep", "shrimp", "spacecraft", "squid"})
# The first that matches counts.
_ENDINGS = (
    (r"(?<!hu)man$", "men"),
    (r"person$", "people"),
    (r"^(el|kni|lea|loa|scar|shea|shel|wol)fe?$", r"\1ves"),
    (r"(s|x|z|ch|sh)$", r"\1es"),
    (r"(?<![aeiou])y$", "ies"),
)
_IN_OES = frozenset({"buffalo", "hero", "mango", "mosquito", "potato", "tomato", "tornado", "volcano", "superhero"})
_PEOPLE = frozenset({"baby", "boy", "child", "girl", "man", "person", "woman"})
_COUNTED_FIRST = _PEOPLE | {"face"}
# Words in "ing" and "ed" are what somebody does or has done, these excepted.
_NOUNS_IN_ING = frozenset(
    {"bed", "building", "dumpling", "king", "pudding", "ring", "seedling", "sled", "string", "wing"}
)
_NO_NOUNS = frozenset(
    {"arrival", "away", "back", "collision", "construction", "departure", "dizzy", "done", "down", "foggy", "left"}
    | {"low", "men", "off", "open", "over", "people", "right", "star-struck", "together", "up", "wide", "women", "zzz"}
)
_UNCLEAR = re.compile(r"[,\d:!?#*]| and |\b(?:one|two|three|four|five|six|seven|eight|nine|ten|o'clock)\b")


def plural(phrase: str) -> str | None:
    """Returns the plural of a countable name, or None if there is none to be sure of."""
    if with_article(phrase) == phrase or _UNCLEAR.search(phrase):
        return None
    head = HEAD_END.split(phrase, maxsplit=1)[0]
    rest = phrase[len(head) :]
    words = head.split()
    if words[0] in _COUNTED_FIRST and len(words) > 1 and words[1].endswith("ing"):
        # "man dancing": the man is counted, whatever he does.
        return " ".join([_plural_noun(words[0]), *words[1:]]) + rest
    last = words[-1]
    is_doing = last.endswith(("ing", "ed")) and last not in _NOUNS_IN_ING
    if is_doing or last.lower() in _NO_NOUNS or not re.fullmatch(r"[A-Za-z'-]*[A-Za-z]", last):
        return None
    # "woman pilot": both words take the plural.
    before = [_plural_noun(word) if word in {"man", "woman"} else word for word in words[:-1]]
    return " ".join([*before, _plural_noun(last)]) + rest


def _plural_noun(noun: str) -> str:
    if noun in _UNCHANGED or noun in _IRREGULAR or noun.endswith("fish"):
        return _IRREGULAR.get(noun, noun)
    for pattern, ending in _ENDINGS:
        if re.search(pattern, noun):
            return re.sub(pattern, ending, noun)
    return f"{noun}es" if noun in _IN_OES else f"{noun}s"
