"""Builds the training corpus of the default model from freely licensed emoji art, and reads it back.

Axes: N drawings, Y = X = `image_size` pixels, four channels of straight-alpha RGBA. Sources and licences are listed in
`packages.py`. A 3-D drawing is kept only if its code point is also in the flat set of the same maker, as the 3-D
package carries drawings of other origin too. Skin-tone variants are left out unless asked for.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.lib.format import open_memmap

from recipes.emoji.captions import MULTI_STYLE_SHARE, SINGLE_STYLE_SHARE, STYLE_PHRASES, Drawing
from recipes.emoji.concepts import Concept, load_concepts
from recipes.emoji.packages import EMOJIBASE, EMOJILIB, UNICODE_EMOJI, CorpusError, Package, Progress, fetch_package
from recipes.emoji.sources import STYLE_PACKAGES, read_style

IMAGES_FILE = "images.npy"
DRAWINGS_FILE = "drawings.jsonl"
MANIFEST_FILE = "manifest.json"

_METADATA_PACKAGES = (EMOJIBASE, EMOJILIB, UNICODE_EMOJI)
_DEFAULT_TEST_PAIRS = 300
_MIN_IMAGE_SIZE = 16
_PROGRESS_EVERY = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What goes into a corpus.

    A drawing is chosen if its group is in `groups` or its subgroup in `subgroups` (both empty: all are), and its label
    is not in `exclude`.

    Attributes:
        styles: Some of "fluent-3d", "fluent-flat", "noto", "noto-v1", "twemoji", in the order of the output.
        image_size: Height and width of the images, in pixels.
        groups: Unicode groups, such as "food-drink".
        subgroups: Unicode subgroups, such as "food-fruit".
        exclude: Labels, as rewritten by `rewrite_label`.
        has_skin_tones: Whether the skin-tone variants are in.
        held_out: Number of drawings of the test split; None is 300 with several styles (or a tenth of the drawings
            that qualify, if that is less) and 0 with one.
        limit: Keeps a random subset of so many drawings; None keeps all.
        seed: Seed of the split and of the subset.
    """

    styles: tuple[str, ...] = ("fluent-3d",)
    image_size: int = 256
    groups: tuple[str, ...] = ()
    subgroups: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    has_skin_tones: bool = False
    held_out: int | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            CorpusError: If a style is unknown or repeated, or a number is out of range.
        """
        if not self.styles or len(set(self.styles)) != len(self.styles):
            raise CorpusError(f"styles must name at least one style, each once, got {list(self.styles)}")
        for style in self.styles:
            if style not in STYLE_PHRASES:
                raise CorpusError(f"styles must be among {sorted(STYLE_PHRASES)}, got {style!r}")
        if self.image_size < _MIN_IMAGE_SIZE:
            raise CorpusError(f"image_size must be at least {_MIN_IMAGE_SIZE}, got {self.image_size}")
        if self.held_out is not None and self.held_out < 0:
            raise CorpusError(f"held_out must not be negative, got {self.held_out}")
        if self.limit is not None and self.limit < 1:
            raise CorpusError(f"limit must be at least 1, got {self.limit}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CorpusConfig":
        """Makes a config from parsed YAML; lists become tuples.

        Raises:
            CorpusError: If a key is unknown, a value has the wrong type or is out of range.
        """
        types = {field.name: field.type for field in fields(cls)}
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key not in types:
                raise CorpusError(f"corpus config must have keys among {sorted(types)}, got {key!r}")
            made[key] = _checked(key, value, types[key])
        return cls(**made)

    def selects(self, concept: Concept) -> bool:
        """Says whether the drawings of a concept belong to the corpus."""
        is_everything = not self.groups and not self.subgroups
        is_chosen = is_everything or concept.group in self.groups or concept.subgroup in self.subgroups
        return is_chosen and concept.label not in self.exclude and (self.has_skin_tones or not concept.is_skin_tone)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A corpus on disk.

    Attributes:
        images_NYXc: All images, mapped copy-on-write; straight alpha, the colour is zero where alpha is.
        drawings: One per image, in the same order.
        manifest: Package hashes, config and counts.
    """

    images_NYXc: UInt8[np.ndarray, "N Y X 4"]
    drawings: tuple[Drawing, ...]
    manifest: Mapping[str, Any]

    @property
    def style_share(self) -> float:
        """The share of captions that shall carry the style phrase."""
        is_single = len({drawing.style for drawing in self.drawings}) == 1
        return SINGLE_STYLE_SHARE if is_single else MULTI_STYLE_SHARE

    def split(self, name: str) -> tuple[Drawing, ...]:
        """Returns the drawings of one split, "train" or "test"."""
        return tuple(drawing for drawing in self.drawings if drawing.split == name)


def build_corpus(config: CorpusConfig, out: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Builds a corpus folder: `images.npy`, `drawings.jsonl` and `manifest.json`.

    The folder appears complete or not at all.

    Args:
        config: What goes in.
        out: The folder to make; must not exist.
        cache: Folder of package tarballs; missing ones are fetched into it.
        progress: Is told what happens, a line at a time.

    Returns:
        `out`.

    Raises:
        CorpusError: If `out` exists, a package cannot be had, a group, subgroup or excluded label is unknown, or
            nothing is selected.
    """
    if out.exists():
        raise CorpusError(f"{out} must not exist yet, remove it to build the corpus again")
    tell: Progress = progress if progress is not None else _ignore
    packages = _needed_packages(config)
    tarballs = {package: fetch_package(package, cache, progress) for package in packages}
    concepts = load_concepts(*(tarballs[package] for package in _METADATA_PACKAGES))
    _check_names(config, concepts)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        drawings = _write_images(config, concepts, tarballs, partial, tell)
        _write_tables(config, packages, drawings, partial)
        # mkdtemp makes a folder for its owner alone; a corpus is an ordinary folder.
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    tell(f"{len(drawings)} drawings in {out}")
    return out


def load_corpus(folder: Path) -> Corpus:
    """Opens a corpus folder; images stay on disk until they are read.

    Raises:
        CorpusError: If a file is missing, unreadable or damaged, or the images and the table disagree.
    """
    for name in (IMAGES_FILE, DRAWINGS_FILE, MANIFEST_FILE):
        if not (folder / name).is_file():
            raise CorpusError(f"{folder} must hold {name}, it does not")
    try:
        images_NYXc = np.load(folder / IMAGES_FILE, mmap_mode="c")
        lines = (folder / DRAWINGS_FILE).read_text(encoding="utf-8").splitlines()
        drawings = tuple(_parse_drawing(json.loads(line)) for line in lines)
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise TypeError(f"{MANIFEST_FILE} holds no mapping")
    except OSError as error:
        raise CorpusError(f"cannot read {folder}: {error}") from None
    except (EOFError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{folder} is damaged ({error}); remove it and build it again with --stage corpus") from None
    if len(images_NYXc) != len(drawings):
        raise CorpusError(f"{folder} must hold as many images as drawings, got {len(images_NYXc)} and {len(drawings)}")
    return Corpus(images_NYXc=images_NYXc, drawings=drawings, manifest=manifest)


def choose_test_pairs(
    pairs: Sequence[tuple[str, str]], held_out: int | None, rng: np.random.Generator
) -> frozenset[tuple[str, str]]:
    """Chooses the (concept, style) pairs of the test split.

    With several styles a pair is chosen only while both its concept and its style remain in training, so that the
    test asks for a combination never seen of things that were. With one style whole concepts are set aside.

    Args:
        pairs: All pairs, each once.
        held_out: How many, see `CorpusConfig.held_out`.
        rng: The only source of randomness.

    Raises:
        CorpusError: If fewer than `held_out` pairs qualify, or nothing would remain to train on.
    """
    is_single = len({style for _, style in pairs}) == 1
    if is_single and held_out is None:
        return frozenset()
    left: dict[str, int] = {}
    for name in (name for pair in pairs for name in pair):
        left[name] = left.get(name, 0) + 1
    qualified = [pair for pair in pairs if is_single or left[pair[0]] > 1]
    wanted = min(_DEFAULT_TEST_PAIRS, len(qualified) // 10) if held_out is None else held_out
    chosen: list[tuple[str, str]] = []
    for at in rng.permutation(len(qualified)):
        concept, style = qualified[int(at)]
        if len(chosen) < wanted and (is_single or left[concept] > 1) and left[style] > 1:
            chosen.append((concept, style))
            left[concept] -= 1
            left[style] -= 1
    if len(chosen) < wanted:
        raise CorpusError(f"held_out must be at most {len(chosen)} for these drawings, got {wanted}")
    return frozenset(chosen)


def _write_images(
    config: CorpusConfig,
    concepts: Mapping[str, Concept],
    tarballs: Mapping[Package, Path],
    folder: Path,
    tell: Progress,
) -> list[Drawing]:
    chosen = {code_point: concept for code_point, concept in concepts.items() if config.selects(concept)}
    size = config.image_size
    scratch = folder / "scratch.npy"
    most = max(1, len(chosen) * len(config.styles))
    rows_NYXc = open_memmap(scratch, mode="w+", dtype=np.uint8, shape=(most, size, size, 4))
    pairs: list[tuple[str, str]] = []
    seen: set[bytes] = set()
    for style in config.styles:
        for code_point, image_YXc in read_style(style, tarballs, tuple(chosen), size):
            digest = hashlib.sha256(image_YXc.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                rows_NYXc[len(pairs)] = image_YXc
                pairs.append((code_point, style))
                if len(pairs) % _PROGRESS_EVERY == 0:
                    tell(f"{len(pairs)} drawings, now {style}")
    if not pairs:
        raise CorpusError("the corpus config must select at least one drawing, it selects none")
    rng = np.random.default_rng(config.seed)
    keep = np.arange(len(pairs))
    if config.limit is not None and config.limit < len(pairs):
        keep = np.sort(rng.permutation(len(pairs))[: config.limit])
    kept = [pairs[int(at)] for at in keep]
    images_NYXc = open_memmap(folder / IMAGES_FILE, mode="w+", dtype=np.uint8, shape=(len(kept), size, size, 4))
    for row, at in enumerate(keep):
        images_NYXc[row] = rows_NYXc[at]
    images_NYXc.flush()
    scratch.unlink()
    test = choose_test_pairs(kept, config.held_out, rng)
    return [_drawing(row, chosen[pair[0]], pair, "test" if pair in test else "train") for row, pair in enumerate(kept)]


def _write_tables(config: CorpusConfig, packages: Sequence[Package], drawings: Sequence[Drawing], folder: Path) -> None:
    lines = [json.dumps(asdict(drawing), ensure_ascii=False) for drawing in drawings]
    (folder / DRAWINGS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "packages": [asdict(package) for package in packages],
        "config": asdict(config),
        "num_drawings": len(drawings),
        "num_concepts": len({drawing.code_point for drawing in drawings}),
        "num_by_style": _count([drawing.style for drawing in drawings]),
        "num_by_group": _count([drawing.group for drawing in drawings]),
        "num_by_split": _count([drawing.split for drawing in drawings]),
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _needed_packages(config: CorpusConfig) -> tuple[Package, ...]:
    needed = [package for style in config.styles for package in STYLE_PACKAGES[style]]
    return tuple(dict.fromkeys([*needed, *_METADATA_PACKAGES]))


def _check_names(config: CorpusConfig, concepts: Mapping[str, Concept]) -> None:
    known = {
        "groups": {concept.group for concept in concepts.values()},
        "subgroups": {concept.subgroup for concept in concepts.values()},
        "exclude": {concept.label for concept in concepts.values()},
    }
    asked = {"groups": config.groups, "subgroups": config.subgroups, "exclude": config.exclude}
    for key, names in asked.items():
        unknown = [name for name in names if name not in known[key]]
        if unknown:
            raise CorpusError(f"{key} must name what the emoji data has, got {', '.join(map(repr, unknown))}")


def _drawing(index: int, concept: Concept, pair: tuple[str, str], split: str) -> Drawing:
    return Drawing(
        index=index,
        code_point=pair[0],
        label=concept.label,
        style=pair[1],
        group=concept.group,
        subgroup=concept.subgroup,
        synonyms=concept.synonyms,
        keywords=concept.keywords,
        split=split,
    )


def _parse_drawing(values: dict[str, Any]) -> Drawing:
    names = {"synonyms": tuple(values["synonyms"]), "keywords": tuple(values["keywords"])}
    return Drawing(**{**values, **names})


def _checked(key: str, value: object, kind: object) -> object:
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise CorpusError(f"{key} must be a list of strings, got {value!r}")
        return tuple(value)
    is_bool = isinstance(value, bool)
    is_number = isinstance(value, int) and not is_bool
    is_right = is_bool if kind is bool else is_number or (value is None and kind == int | None)
    if not is_right:
        raise CorpusError(f"{key} must be {'true or false' if kind is bool else 'a whole number'}, got {value!r}")
    return value


def _count(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _ignore(_: str) -> None:
    pass
