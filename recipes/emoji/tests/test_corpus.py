"""The corpus: captions, rewritten labels, the split rule, config checks and pinned hashes; nothing is downloaded."""

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.core.errors import FoveateError
from recipes.emoji import corpus as corpus_module
from recipes.emoji import packages
from recipes.emoji.captions import (
    Drawing,
    all_captions,
    caption,
    clean_phrases,
    framed_captions,
    rewrite_label,
    with_article,
)
from recipes.emoji.concepts import code_point_key
from recipes.emoji.corpus import CorpusConfig, build_corpus, choose_test_pairs, load_corpus
from recipes.emoji.packages import FLUENT_3D, CorpusError, Package, fetch_package, verify_package
from recipes.emoji.recipe import load_corpus_config
from recipes.emoji.sources import svg_of_icon
from recipes.emoji.stages import train
from recipes.emoji.tests.toy_corpus import write_corpus

APPLE = Drawing(
    index=0,
    code_point="1f34e",
    label="red apple",
    style="fluent-3d",
    group="food-drink",
    subgroup="food-fruit",
    synonyms=("apple",),
    keywords=("fruit", "ripe", "food"),
    split="train",
)


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("red apple", "red apple"),
        ("flag: Japan", "flag of Japan"),
        ("flag: United States", "flag of the United States"),
        ("person: blond hair", "person with blond hair"),
        ("man: beard", "man with a beard"),
        ("woman: bald", "bald woman"),
        ("keycap: 3", "keycap 3"),
        ("family: man, woman, boy", "family of a man, a woman and a boy"),
        ("person walking: facing right", "person walking facing right"),
        ("person: light skin tone, blond hair", "person with light skin tone and blond hair"),
        ("man: dark skin tone, bald", "bald man with dark skin tone"),
        ("man: dark skin tone, beard", "man with dark skin tone and a beard"),
        ("kiss: woman, man, light skin tone", "kiss of a woman and a man with light skin tone"),
        ("kiss: dark skin tone", "kiss with dark skin tone"),
        (
            "couple with heart: woman, man, light skin tone, dark skin tone",
            "couple with heart, a woman and a man with light skin tone and dark skin tone",
        ),
        ("man walking: light skin tone, facing right", "man walking facing right with light skin tone"),
        ("woman\u2019s hat", "woman's hat"),
    ],
)
def test_labels_become_phrases(label: str, phrase: str) -> None:
    assert rewrite_label(label) == phrase


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange", "an orange"),
        ("unicorn", "a unicorn"),
        ("UFO", "a UFO"),
        ("onion", "an onion"),
        ("octopus", "an octopus"),
        ("cherries", "cherries"),
        ("bread", "bread"),
        ("glass of milk", "a glass of milk"),
        ("Tokyo tower", "Tokyo tower"),
        ("Christmas tree", "a Christmas tree"),
        ("T-Rex", "a T-Rex"),
    ],
)
def test_articles(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


def test_captions_follow_the_generator_and_its_shares() -> None:
    first = [caption(APPLE, np.random.default_rng(seed), style_share=0.3) for seed in range(50)]
    again = [caption(APPLE, np.random.default_rng(seed), style_share=0.3) for seed in range(50)]
    assert first == again

    rng = np.random.default_rng(0)
    many = [caption(APPLE, rng, style_share=0.85) for _ in range(4000)]
    bare = [one.removesuffix(", 3D emoji") for one in many]
    assert np.mean([one in {"red apple", "a red apple"} for one in bare]) == pytest.approx(0.60, abs=0.03)
    assert np.mean([one in {"apple", "an apple"} for one in bare]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([one.endswith("3D emoji") for one in many]) == pytest.approx(0.85, abs=0.03)
    assert all(many)


def test_captions_without_synonyms_or_keywords_are_the_label() -> None:
    plain = replace(APPLE, synonyms=(), keywords=())
    rng = np.random.default_rng(0)
    assert {caption(plain, rng, style_share=0.0) for _ in range(200)} == {"red apple", "a red apple"}


def test_all_captions_are_few_unique_and_start_with_the_label() -> None:
    rich = replace(APPLE, synonyms=("apple", "one", "two", "three"), keywords=("a1", "b2", "c3", "d4", "e5"))
    for drawing in (APPLE, rich, replace(APPLE, synonyms=(), keywords=())):
        found = all_captions(drawing)
        assert found == all_captions(drawing)
        assert len(set(found)) == len(found) <= 12
        assert found[:3] == ["red apple", "a red apple", "red apple, 3D emoji"]


def test_clean_phrases_drops_labels_taken_names_and_codes() -> None:
    raw = ["red_apple", "apple", "Apple", "dog", "cow2", ":D", "juicy_apple"]
    assert clean_phrases(raw, "red apple", frozenset({"dog"})) == ("apple", "juicy apple")


def test_split_holds_out_only_combinations_whose_parts_were_seen() -> None:
    pairs = [(f"c{concept}", f"s{style}") for concept in range(60) for style in range(4) if (concept + style) % 3]
    pairs.append(("lonely", "s0"))
    test = choose_test_pairs(pairs, 30, np.random.default_rng(1))
    train = [pair for pair in pairs if pair not in test]
    assert len(test) == 30
    assert test == choose_test_pairs(pairs, 30, np.random.default_rng(1))
    assert {concept for concept, _ in test} <= {concept for concept, _ in train}
    assert {style for _, style in test} <= {style for _, style in train}
    assert ("lonely", "s0") not in test


def test_split_of_one_style_needs_a_number() -> None:
    pairs = [(f"c{concept}", "fluent-3d") for concept in range(20)]
    assert choose_test_pairs(pairs, None, np.random.default_rng(0)) == frozenset()
    assert len(choose_test_pairs(pairs, 5, np.random.default_rng(0))) == 5
    with pytest.raises(CorpusError, match="held_out must be at most 19"):
        choose_test_pairs(pairs, 20, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"styles": ["oil"]}, "styles must be among"),
        ({"styles": []}, "at least one style"),
        ({"styles": "noto"}, "styles must be a list of strings"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
        ({"image_size": True}, "image_size must be a whole number"),
        ({"held_out": -1}, "held_out must not be negative"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"colour": 1}, "got 'colour'"),
    ],
)
def test_config_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        CorpusConfig.from_dict(values)


def test_config_from_yaml_values() -> None:
    config = CorpusConfig.from_dict({"styles": ["noto", "twemoji"], "held_out": None, "exclude": ["red apple"]})
    assert config == CorpusConfig(styles=("noto", "twemoji"), exclude=("red apple",))


def _tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_code_points_keep_their_zeros() -> None:
    assert code_point_key("0033-FE0F-20E3") == "0033-20e3"
    assert code_point_key("33-fe0f-20e3") == "33-20e3"


def test_wrong_hash_is_one_line(tmp_path: Path) -> None:
    _tarball(tmp_path / FLUENT_3D.file_name, {"package.json": b"{}"})
    with pytest.raises(CorpusError, match=f"must have sha256 {FLUENT_3D.sha256}, got ") as caught:
        fetch_package(FLUENT_3D, tmp_path)
    assert "\n" not in str(caught.value)


def test_right_hash_is_taken_from_the_cache(tmp_path: Path) -> None:
    package = Package(name="@a/b", version="1.0.0", sha256=hashlib.sha256(b"x").hexdigest(), licence="MIT")
    (tmp_path / "a-b-1.0.0.tgz").write_bytes(b"x")
    assert fetch_package(package, tmp_path) == tmp_path / "a-b-1.0.0.tgz"
    verify_package(package, tmp_path / "a-b-1.0.0.tgz")


def test_missing_npm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="needs the npm client"):
        fetch_package(FLUENT_3D, tmp_path / "cache")


def test_svg_follows_aliases_and_keeps_the_aspect_ratio() -> None:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"hand": {"body": "<path/>", "height": 20}},
        "aliases": {"other": {"parent": "hand", "hFlip": True}, "turned": {"parent": "hand", "rotate": 1}},
    }
    assert 'viewBox="0 0 32 20"' in str(svg_of_icon(icons, "hand", 64))
    assert "scale(-1 1)" in str(svg_of_icon(icons, "other", 64))
    assert svg_of_icon(icons, "absent", 64) is None
    with pytest.raises(CorpusError, match="hFlip only"):
        svg_of_icon(icons, "turned", 64)


def _webp(colour: tuple[int, int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (32, 32), colour).save(stream, "WEBP", lossless=True, exact=True)
    return stream.getvalue()


@pytest.fixture
def toy_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of tiny tarballs: three fruits, of which two look the same, and one file of unknown origin."""
    fruits = {"1F34E": "red apple", "1F345": "tomato", "1F34B": "lemon", "1F350": "pear"}
    data = [
        {"label": label, "hexcode": code, "emoji": chr(int(code, 16)), "tags": ["fruit"], "group": 4, "subgroup": 42}
        for code, label in fruits.items()
    ]
    meta = {"groups": {"4": "food-drink"}, "subgroups": {"42": "food-fruit"}}
    shortcodes = {f"en/shortcodes/{name}.json": b"{}" for name in ("emojibase", "github", "iamcal", "joypixels")}
    contents = {
        "EMOJIBASE": {"en/data.json": json.dumps(data).encode(), "meta/groups.json": json.dumps(meta).encode()},
        "EMOJILIB": {"dist/emoji-en-US.json": b"{}"},
        "UNICODE_EMOJI": {"data-by-emoji.json": b"{}"},
        "FLUENT_3D": {
            "assets/1f34e.webp": _webp((255, 0, 0, 255)),
            "assets/1f345.webp": _webp((255, 0, 0, 255)),
            "assets/1f34b.webp": _webp((255, 255, 0, 128)),
            "assets/1f350.webp": _webp((0, 255, 0, 255)),
        },
        "FLUENT_FLAT": {"chars.json": json.dumps({"1f34e": "a", "1f345": "b", "1f34b": "c"}).encode()},
    }
    contents["EMOJIBASE"].update(shortcodes)
    for name, members in contents.items():
        _tarball(tmp_path / f"{name}.tgz", members)

    def fetch(package: Package, cache: Path, _progress: object = None) -> Path:
        return cache / f"{next(name for name in contents if getattr(packages, name) == package)}.tgz"

    monkeypatch.setattr(corpus_module, "fetch_package", fetch)
    return tmp_path


def test_build_and_load(toy_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "core"
    config = CorpusConfig(image_size=16, held_out=1, groups=("food-drink",))
    assert build_corpus(config, out, toy_cache) == out
    made = load_corpus(out)
    # The tomato looks like the apple, and the flat set does not have the pear.
    assert [drawing.label for drawing in made.drawings] == ["red apple", "lemon"]
    assert made.images_NYXc.shape == (2, 16, 16, 4)
    assert made.images_NYXc[1, 8, 8].tolist() == [255, 255, 0, 128]
    assert [len(made.split(name)) for name in ("train", "test")] == [1, 1]
    assert made.manifest["config"]["image_size"] == 16
    assert made.style_share == pytest.approx(0.3)
    assert sorted(path.name for path in out.iterdir()) == ["drawings.jsonl", "images.npy", "manifest.json"]
    with pytest.raises(CorpusError, match="must not exist yet"):
        build_corpus(config, out, toy_cache)


@pytest.mark.parametrize(
    "wrong",
    [
        CorpusConfig(image_size=16, groups=("fod",)),
        CorpusConfig(image_size=16, exclude=("aple",)),
        CorpusConfig(image_size=16, exclude=("red apple", "lemon", "tomato", "pear")),
    ],
)
def test_failed_build_leaves_nothing(toy_cache: Path, tmp_path: Path, wrong: CorpusConfig) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    with pytest.raises(CorpusError, match=r"must name what|selects none"):
        build_corpus(wrong, folder / "core", toy_cache)
    assert not list(folder.iterdir())


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"must hold images\.npy"):
        load_corpus(tmp_path)


def test_a_corpus_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus", 32)

    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied", "images.npy")

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(CorpusError, match=r"cannot read .*Permission denied"):
        load_corpus(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["drawings.jsonl", "images.npy", "manifest.json"])
@pytest.mark.parametrize("left", [b"", b'{"label": "a"', b"[1]\n"])
def test_a_damaged_corpus_is_one_line(name: str, left: bytes, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 32)
    (tmp_path / "corpus" / name).write_bytes(left)
    with pytest.raises(CorpusError, match=r"is damaged|as many images as drawings"):
        load_corpus(tmp_path / "corpus")


def test_framed_captions_name_the_thing_and_repeat_themselves() -> None:
    drawing = Drawing(
        index=7, code_point="1f68c", label="bus", style="fluent-3d", group="travel", subgroup="ground",
        synonyms=("coach",), keywords=("vehicle",), split="train",
    )  # fmt: skip
    found = framed_captions(drawing, 200)
    assert found == framed_captions(drawing, 200)
    assert found[:12] == framed_captions(drawing)
    assert all("bus" in caption or "coach" in caption for caption in found)
    assert len(set(found)) > 100
    assert "an orange bus" in framed_captions(drawing, 4000)


def test_a_corpus_needs_no_training_file(toy_cache: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.yaml"
    corpus.write_text("image_size: 16\ngroups: [food-drink]\n", encoding="utf-8")
    training = tmp_path / "training.yaml"
    training.write_text("name: toy\ncorpus: corpus.yaml\n", encoding="utf-8")
    assert (
        load_corpus_config(training)
        == load_corpus_config(corpus)
        == CorpusConfig(image_size=16, groups=("food-drink",))
    )
    out = tmp_path / "run"
    shutil.copytree(toy_cache, out / "packages", ignore=shutil.ignore_patterns("run"))
    made = train(corpus, out, "corpus", lambda _: None)
    assert made == out / "corpus"
    assert len(load_corpus(made).drawings) == 2
    corpus.write_text("- not a mapping\n", encoding="utf-8")
    with pytest.raises(FoveateError, match="cannot read the corpus file"):
        load_corpus_config(corpus)


@pytest.mark.parametrize("name", ["emoji_corpus", "emoji_core5_corpus"])
def test_corpus_files_are_read(name: str) -> None:
    assert load_corpus_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml").image_size == 256
