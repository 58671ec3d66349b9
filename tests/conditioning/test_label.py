"""Class labels: numbers, names of ImageNet, and what is said about those that name none or several."""

import re

import pytest

from foveate.conditioning.label import class_index, class_names
from foveate.core.errors import FoveateError

# Known from many published demonstrations, not from the file under test.
FACTS = {
    0: "tench",
    1: "goldfish",
    88: "macaw",
    207: "golden retriever",
    250: "Siberian husky",
    279: "Arctic fox",
    291: "lion",
    360: "otter",
    387: "lesser panda",
    388: "giant panda",
    417: "balloon",
    437: "beacon",
    555: "fire engine",
    817: "sports car",
    933: "cheeseburger",
    972: "cliff",
    974: "geyser",
    980: "volcano",
    999: "toilet tissue",
}


@pytest.mark.parametrize(("index", "name"), FACTS.items())
def test_known_classes(index: int, name: str) -> None:
    assert class_index(name) == class_index(name.upper()) == class_index(index) == class_index(str(index)) == index


def test_every_class_is_found_by_all_its_names_together() -> None:
    names = class_names()
    assert len(names) == 1000
    for index, line in enumerate(names):
        parts = line.split(", ")
        assert all(part and part == part.strip() for part in parts)
        if line in ("partridge", "harp", "missile", "cardigan"):
            # One name, which another class has among several.
            with pytest.raises(FoveateError, match="names 2 classes"):
                class_index(line)
        else:
            assert class_index(line) == index


@pytest.mark.parametrize("name", [" golden   retriever ", "golden_retriever", "Golden-Retriever", "GOLDEN RETRIEVER"])
def test_spelling_makes_no_difference(name: str) -> None:
    assert class_index(name) == 207


@pytest.mark.parametrize("name", ["Carassius auratus", "goldfish", "goldfish, Carassius auratus"])
def test_any_synonym(name: str) -> None:
    assert class_index(name) == 1


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("crane", "134 (crane, crane (bird))", "517 (crane, crane (machine))"),
        ("Maillot", "638 (maillot, maillot (tights))", "639 (maillot, tank suit, maillot (swimsuit))"),
    ],
)
def test_ambiguous_names_say_both_classes(name: str, first: str, second: str) -> None:
    with pytest.raises(FoveateError, match=re.escape(f"'{name}' names 2 classes: give {first} or {second}")):
        class_index(name)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("crane (bird)", 134),
        ("crane (machine)", 517),
        ("maillot (tights)", 638),
        ("maillot, tank suit", 639),
        ("lynx, catamount", 287),
    ],
)
def test_ambiguous_names_can_be_told_apart(name: str, index: int) -> None:
    assert class_index(name) == index


def test_unknown_names_suggest_close_ones() -> None:
    with pytest.raises(
        FoveateError, match="no ImageNet class 'golden retreiver'; did you mean golden retriever"
    ) as caught:
        class_index("golden retreiver")
    assert str(caught.value).endswith("an index from 0 to 999 works too")
    assert "\n" not in str(caught.value)


def test_a_word_of_names_suggests_them() -> None:
    with pytest.raises(FoveateError, match="no ImageNet class 'Cat'; did you mean tabby cat or tiger cat or "):
        class_index("Cat")


@pytest.mark.parametrize("name", ["", "zzzzqqqq", "tench, goldfish", "tench,", "2.5"])
def test_what_names_nothing_is_refused(name: str) -> None:
    with pytest.raises(FoveateError, match=f"no ImageNet class {re.escape(repr(name))}; "):
        class_index(name)


@pytest.mark.parametrize("label", [-1, 1000, "-1", "1000", "+1000"])
def test_index_out_of_range(label: int | str) -> None:
    with pytest.raises(FoveateError, match=re.escape(f"a class must be in [0, 999], got {label}")):
        class_index(label)


def test_models_with_other_classes_have_indices_only() -> None:
    assert class_index(9, num_classes=10) == class_index("9", num_classes=10) == 9
    with pytest.raises(FoveateError, match=r"must be in \[0, 9\], got 10"):
        class_index("10", num_classes=10)
    with pytest.raises(FoveateError, match="this model has 10: give an index from 0 to 9, got 'tench'"):
        class_index("tench", num_classes=10)
