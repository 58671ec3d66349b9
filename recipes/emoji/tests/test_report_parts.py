"""Parts of the report on coloured squares in memory: bits, copies, paraphrases, pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from foveate.pipeline.output import to_uint8
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji.captions import Drawing
from recipes.emoji.corpus import Corpus
from recipes.emoji.examiner import Examiner
from recipes.emoji.figures import Figure
from recipes.emoji.tokenizer import composite

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
    (figure,) = examiner(toy_pipe, toy_corpus(), Copyist)._reworded()
    # They come as taxi, lion, guitar; the copyist draws lion, taxi, guitar.
    assert figure.value == pytest.approx(1 / 3)
    assert figure.note.startswith("3 prompts")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_measured_in_any_number_format(toy_folder: Any, dtype: str) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, dtype=dtype)
    found = by_name(examiner(pipe, toy_corpus())._bits())
    shares = [figure.value for name, figure in found.items() if name.startswith("bits in use, scale")]
    assert len(shares) == len(pipe.model.spec.default_schedule)
    assert found["bits in use"].value == pytest.approx(np.mean(shares))
    assert 0 < found["entropy per bit"].value <= 1


def test_pairs_need_styles_and_drawings_held_out(toy_pipe: Pipeline) -> None:
    one = toy_corpus()
    (figure,) = examiner(toy_pipe, one)._pairs()
    assert (figure.value, figure.note) == (None, "one style: there are none")
    two = (replace(one.drawings[0], style="twemoji"), *one.drawings[1:])
    (figure,) = examiner(toy_pipe, replace(one, drawings=two))._pairs()
    assert (figure.value, figure.note) == (None, "the corpus has no held-out split")
