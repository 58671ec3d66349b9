"""Trains the two heads of text match on a corpus of real art, after a check on a style they have never seen.

The check leaves every drawing of one style out, trains on the others and asks which of 500 labels each drawing of the
left-out style carries; concepts are shared between the styles, drawings are not. The heads that are kept are trained
on all styles with the same settings, so the check is an estimate for them and not a measurement of them.

Axes: N drawings, Y = X pixels, F image features, t texts, E text width, r random draws.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, UInt8

from foveate.core.errors import FoveateError
from recipes.emoji.corpus import load_corpus
from recipes.emoji.features import FEATURE_WIDTH, features, load_network
from recipes.emoji.heads import TextMatch, TextMatchTraining, train_text_match
from recipes.emoji.texts import bundled_encoder

HELD_OUT_STYLE = "fluent-3d"
NUM_WAYS = 500
# Retrieval among 500 depends on which 500: the figure is the mean over so many random draws of concepts.
NUM_DRAWS = 20
READ_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMatchCheck:
    """How well heads read a style that they were not trained on.

    Attributes:
        held_out_style: The style.
        num_ways: Labels to choose from.
        r_at_1: Mean share of drawings whose own label came first.
        r_at_1_spread: Standard deviation over the random draws of `num_ways` concepts.
        r_at_1_train: The same mean for the styles trained on.
    """

    held_out_style: str
    num_ways: int
    r_at_1: float
    r_at_1_spread: float
    r_at_1_train: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Features of the images and texts of a corpus, with the concept of each; text c is the label of concept c."""

    image_NF: Float32[np.ndarray, "N F"]
    concept_N: Int[np.ndarray, " N"]
    style_N: np.ndarray
    text_tE: Float32[np.ndarray, "t E"]
    text_concept_t: Int[np.ndarray, " t"]


def train_text_match_heads(
    corpus_folder: Path,
    out: Path,
    *,
    held_out_style: str = HELD_OUT_STYLE,
    settings: TextMatchTraining | None = None,
) -> TextMatchCheck:
    """Checks the recipe on a held-out style, then trains on everything and writes the heads.

    Args:
        corpus_folder: What `build_corpus` made, of at least two styles.
        out: Safetensors file to write.
        held_out_style: Style that the check leaves out.
        settings: How to train; the defaults if None.

    Returns:
        What the check measured.

    Raises:
        FoveateError: If the corpus lacks the style, has no other, or is too small to check.
    """
    rows = _read_rows(corpus_folder)
    is_held_out = rows.style_N == held_out_style
    if is_held_out.all() or not is_held_out.any():
        raise FoveateError(
            f"the corpus must have {held_out_style!r} and another style, got {sorted(set(rows.style_N.tolist()))}"
        )
    check = _check(rows, is_held_out, held_out_style, settings)
    _train(rows, np.ones_like(is_held_out), settings).save(out)
    return check


def white_composite(rgba_NYXc: UInt8[np.ndarray, "N Y X 4"]) -> UInt8[np.ndarray, "N Y X 3"]:
    """Puts straight-alpha drawings on white, rounded to the nearest level; the input is left as it was."""
    alpha_NYX1 = rgba_NYXc[..., 3:].astype(np.float32) / 255
    return (rgba_NYXc[..., :3] * alpha_NYX1 + 255 * (1 - alpha_NYX1) + 0.5).astype(np.uint8)


def _read_rows(corpus_folder: Path) -> _Rows:
    corpus = load_corpus(corpus_folder)
    concept_of = {label: at for at, label in enumerate(dict.fromkeys(drawing.label for drawing in corpus.drawings))}
    network = load_network()
    image_NF = np.empty((len(corpus.drawings), FEATURE_WIDTH), dtype=np.float32)
    for start in range(0, len(image_NF), READ_BATCH):
        batch = white_composite(np.asarray(corpus.images_NYXc[start : start + READ_BATCH]))
        image_NF[start : start + READ_BATCH] = features(batch, network=network)
    names = sorted({(concept_of[drawing.label], name) for drawing in corpus.drawings for name in drawing.synonyms})
    texts = [*concept_of, *(name for _, name in names)]
    return _Rows(
        image_NF=image_NF,
        concept_N=np.array([concept_of[drawing.label] for drawing in corpus.drawings]),
        style_N=np.array([drawing.style for drawing in corpus.drawings]),
        text_tE=bundled_encoder().pooled(texts).numpy(),
        text_concept_t=np.array([*range(len(concept_of)), *(concept for concept, _ in names)]),
    )


def _train(rows: _Rows, is_used: Bool[np.ndarray, " N"], settings: TextMatchTraining | None) -> TextMatch:
    return train_text_match(
        rows.image_NF[is_used],
        rows.text_tE,
        rows.concept_N[is_used],
        text_concept_ids=rows.text_concept_t,
        settings=settings,
    )


def _check(
    rows: _Rows, is_held_out: Bool[np.ndarray, " N"], held_out_style: str, settings: TextMatchTraining | None
) -> TextMatchCheck:
    match = _train(rows, ~is_held_out, settings)
    # Only concepts that training saw in another style: the check is about the style.
    is_judged = is_held_out & np.isin(rows.concept_N, rows.concept_N[~is_held_out])
    draws = _r_at_1_draws(match, rows, is_judged)
    return TextMatchCheck(
        held_out_style=held_out_style,
        num_ways=NUM_WAYS,
        r_at_1=float(draws.mean()),
        r_at_1_spread=float(draws.std()),
        r_at_1_train=float(_r_at_1_draws(match, rows, ~is_held_out).mean()),
    )


def _r_at_1_draws(match: TextMatch, rows: _Rows, is_judged: Bool[np.ndarray, " N"]) -> Float64[np.ndarray, " r"]:
    # The same draws for every call, so that two sets of heads are compared on the same questions.
    rng = np.random.default_rng(0)
    concepts = np.unique(rows.concept_N[is_judged])
    if len(concepts) < NUM_WAYS:
        raise FoveateError(f"the check needs {NUM_WAYS} concepts of the held-out style, got {len(concepts)}")
    values = np.empty(NUM_DRAWS)
    for draw in range(NUM_DRAWS):
        chosen = np.sort(rng.choice(concepts, NUM_WAYS, replace=False))
        is_asked = is_judged & np.isin(rows.concept_N, chosen)
        targets = np.searchsorted(chosen, rows.concept_N[is_asked])
        values[draw] = match.r_at_1(rows.image_NF[is_asked], rows.text_tE[chosen], targets)
    return values
