"""The report on a toy model and coloured shapes: what real art must reach, and what is said where nothing can be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.conditioning.minilm import TextEncoder
from foveate.core.errors import FoveateError
from foveate.eval.figures import Figure
from foveate.families.loading import Origin, find_folder
from foveate.pipeline import Pipeline
from foveate.train.corpus import Corpus, load_corpus
from foveate.train.examiner import Examiner
from tests.toy_corpus import NAMES, write_toy_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_corpus(tmp_path_factory.mktemp("run") / "corpus")


def examiner(pipe: Pipeline, corpus: Corpus, **changes: Any) -> Examiner:
    pipe.set_progress_bar_config(disable=True)
    texts = TextEncoder.from_folder(find_folder(Origin(name_or_path="emoji")))
    return Examiner(**({"pipe": pipe, "corpus": corpus, "texts": texts, "num_prompts": 8} | changes))


@pytest.fixture(scope="module")
def figures(toy_pipe: Pipeline, folder: Path) -> dict[str, Figure]:
    return {figure.name: figure for figure in examiner(toy_pipe, load_corpus(folder)).figures()}


def test_real_art_passes_the_checks_that_judge_the_model(figures: dict[str, Figure]) -> None:
    assert figures["background colour"].ceiling == 1
    assert figures["number of things"].ceiling == 1
    assert figures["style"].ceiling == 1, "squares and discs are told apart"


def test_a_model_that_draws_noise_misses(figures: dict[str, Figure]) -> None:
    for name in ("background colour", "number of things", "KID x 1000, noto", "tokenizer PSNR dB, drawings held out"):
        assert figures[name].verdict == "missed", name
    assert figures["copies of a training drawing"].value == 0


def test_all_figures_of_the_two_styles_are_there(figures: dict[str, Figure]) -> None:
    assert {"KID x 1000, noto", "KID x 1000, twemoji", "entropy per bit", "bits in use, scale of 16 x 16"} <= set(
        figures
    )
    assert figures["held-out pairs of concept and style"].value is not None
    targets = {figure.target for figure in figures.values()} - {None}
    assert targets == {28.0, 0.95, 0.8, 0.9, 20.0, 0.7, 0.5}
    assert figures["nearest drawing is the right one, paraphrases"].value is None


def test_scales_average_to_the_whole(figures: dict[str, Figure]) -> None:
    shares = [figure.value for name, figure in figures.items() if name.startswith("bits in use, scale")]
    assert figures["bits in use"].value == pytest.approx(np.mean(shares))


def test_a_corpus_of_one_style_gets_no_figure_for_it(toy_pipe: Pipeline, folder: Path) -> None:
    whole = load_corpus(folder)
    drawings = tuple(replace(one, style="noto") for one in whole.drawings)
    single = examiner(toy_pipe, replace(whole, drawings=drawings))
    found = [*single._styles(), *single._pairs()]
    assert [figure.value for figure in found] == [None, None]
    assert all(figure.note.startswith("one style") and not figure.verdict for figure in found)
    trained = tuple(replace(one, split="train") for one in whole.drawings)
    (pairs,) = examiner(toy_pipe, replace(whole, drawings=trained))._pairs()
    assert (pairs.value, pairs.note) == (None, "the corpus holds none out")


def test_paraphrases_are_asked_in_words_of_their_own(toy_pipe: Pipeline, folder: Path) -> None:
    whole = load_corpus(folder)
    names = ("lion", "taxi", *NAMES[2:])
    renamed = tuple(replace(one, label=names[one.index % len(NAMES)]) for one in whole.drawings)
    (figure,) = examiner(toy_pipe, replace(whole, drawings=renamed))._reworded()
    assert figure.value is not None
    assert figure.note.startswith("3 prompts"), "lion, taxi, guitar"


@pytest.mark.parametrize("num_prompts", [7, 23])
def test_prompts_out_of_range_are_refused(toy_pipe: Pipeline, folder: Path, num_prompts: int) -> None:
    with pytest.raises(FoveateError, match="--prompts must be from 8 to 22, the drawings trained on"):
        examiner(toy_pipe, load_corpus(folder), num_prompts=num_prompts)


def test_other_number_formats_are_measured_too(toy_folder: Path, folder: Path) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, dtype="bfloat16")
    found = {figure.name: figure for figure in examiner(pipe, load_corpus(folder))._bits()}
    assert 0 < found["entropy per bit"].value <= 1
