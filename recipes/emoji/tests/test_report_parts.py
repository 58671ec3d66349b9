"""Parts of the report on coloured squares in memory: bits, copies, paraphrases, pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from foveate.pipeline.output import to_uint8
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji.bits import area_entropy, bit_entropy, bit_means, flat_tokens
from recipes.emoji.captions import Drawing
from recipes.emoji.corpus import Corpus
from recipes.emoji.examiner import Compared, Examiner
from recipes.emoji.figures import Figure
from recipes.emoji.tokenizer import composite
from recipes.emoji.tokens import bit_figures

NAMES = ("lion", "taxi", "guitar", "boat", "lamp", "house", "rocket", "bottle", "chair")


def toy_corpus() -> Corpus:
    """A square of random coarse colours per concept; all trained on, one style."""
    images = np.zeros((len(NAMES), 256, 256, 4), np.uint8)
    drawings = []
    for index, name in enumerate(NAMES):
        cells = np.random.default_rng(index).integers(0, 256, (4, 4, 3)).repeat(48, 0).repeat(48, 1)
        images[index, 32:-32, 32:-32] = np.concatenate([cells, np.full((192, 192, 1), 255)], axis=-1)
        drawings.append(
            Drawing(
                index=index, code_point=f"{index:x}", label=name, style="noto", group="objects", subgroup="toy",
                synonyms=(), keywords=(), split="train",
            )
        )  # fmt: skip
    return Corpus(images_NYXc=images, drawings=tuple(drawings), manifest={})


@dataclass(kw_only=True)
class Copyist(Examiner):
    """Draws the corpus itself for whatever is asked, from its first drawing on."""

    def draw(self, prompts: Sequence[str]) -> np.ndarray:
        """Drawings in order."""
        rows = [i % len(NAMES) for i in range(len(prompts))]
        return to_uint8(composite(self.corpus.images_NYXc[rows]))


def examiner(pipe: Pipeline, corpus: Corpus, kind: type[Examiner] = Examiner) -> Examiner:
    return kind(pipe=pipe, corpus=corpus, num_prompts=8)


def by_name(figures: Any) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def test_whoever_copies_is_found_out_and_drawings_are_no_copies_of_each_other(toy_pipe: Pipeline) -> None:
    found = by_name(examiner(toy_pipe, toy_corpus(), Copyist)._memorisation())
    copies, cosine = found["copies of a training drawing"], found["nearest training drawing, cosine of features"]
    assert (copies.value, copies.ceiling) == (1.0, 0.0)
    assert cosine.value == pytest.approx(1.0, abs=1e-4)
    assert cosine.ceiling is not None
    assert cosine.ceiling < 0.999


def test_paraphrases_that_the_corpus_knows_are_asked(toy_pipe: Pipeline) -> None:
    figure, second = examiner(toy_pipe, toy_corpus(), Copyist)._reworded()
    assert (second.name, second.value) == (f"{figure.name}, second judge", figure.value)
    # They come as taxi, lion, guitar; the copyist draws lion, taxi, guitar.
    assert figure.value == pytest.approx(1 / 3)
    assert figure.note.startswith("3 prompts")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_measured_in_any_number_format(toy_folder: Any, dtype: str) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, dtype=dtype)
    found = by_name(bit_figures(examiner(pipe, toy_corpus())))
    shares = [figure.value for name, figure in found.items() if name.startswith("bits in use, scale")]
    assert len(shares) == len(pipe.model.spec.default_schedule)
    assert found["bits in use"].value == pytest.approx(np.mean(shares))
    assert 0 < found["entropy per bit"].value <= 1
    areas = [figure for name, figure in found.items() if name.startswith("entropy per bit on")]
    assert len(areas) == 2 * len(shares)


def test_both_judges_see_what_was_shuffled_and_measure_on_their_own_scales(toy_pipe: Pipeline) -> None:
    corpus = toy_corpus()
    few = replace(corpus, images_NYXc=corpus.images_NYXc[:3], drawings=corpus.drawings[:3])
    copyist, drawings = examiner(toy_pipe, few, Copyist), list(few.drawings)
    right, turned = copyist.on_white(drawings), copyist.on_white([*drawings[1:], drawings[0]])
    for images, share in ((right, 1.0), (turned, 0.0)):
        found = by_name(copyist._nearest(drawings, images, right))
        for suffix in ("", ", second judge"):
            figure = found[f"nearest drawing is the right one{suffix}"]
            assert (figure.value, figure.ceiling) == (share, 1.0)
    compared = Compared(own=turned[:2], real=right[:2], others=right[1:])
    first, second = (next(copyist._kid(compared, judge, "noto", "")) for judge in ("lite0", "lite2"))
    assert first.value != second.value
    assert (first.target, second.target) == (55.0, None)


def test_flat_and_textured_areas_have_their_own_entropy() -> None:
    images = np.full((2, 64, 64, 3), 200, np.uint8)
    images[:, :, 32:] = np.random.default_rng().integers(0, 256, (2, 64, 32, 3))
    images[0, 5, 5] += 3
    is_flat = flat_tokens(images, (4, 4))
    assert is_flat[:, :, :2].all()
    assert not is_flat[:, :, 2:].any()
    images[0, 5, 5, 1] += 3
    assert not flat_tokens(images, (4, 4))[0, 0, 0]
    bits = np.random.default_rng().random((2, 4, 4, 8)) < 0.5
    bits[is_flat] = True
    assert area_entropy(bits, is_flat) == 0.0
    assert area_entropy(bits, ~is_flat) == pytest.approx(bit_entropy(bit_means([bits[~is_flat][:, None, None]]))[0])
    assert area_entropy(bits, np.zeros_like(is_flat)) is None


def test_pairs_need_styles_and_drawings_held_out(toy_pipe: Pipeline) -> None:
    one = toy_corpus()
    (figure,) = examiner(toy_pipe, one)._pairs()
    assert (figure.value, figure.note) == (None, "one style: there are none")
    two = (replace(one.drawings[0], style="twemoji"), *one.drawings[1:])
    (figure,) = examiner(toy_pipe, replace(one, drawings=two))._pairs()
    assert (figure.value, figure.note) == (None, "the corpus has no held-out split")
