"""The report of a model: a perfect drawer reaches the ceilings, a blank one does not, and the command writes it all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline
from recipes.emoji.corpus import load_corpus
from recipes.emoji.examiner import Examiner
from recipes.emoji.figures import Figure
from recipes.emoji.paraphrases import bundled_paraphrases
from recipes.emoji.scenes import Scene
from recipes.emoji.tests.toy_corpus import write_corpus


@dataclass(kw_only=True)
class Drawer(Examiner):
    """Does not ask the model: draws real art for every prompt that it gave out, or nothing at all."""

    is_blank: bool
    known: dict[str, Scene] = field(default_factory=dict)

    def scenes(self, *args: Any, **shares: float) -> list[Scene]:
        """Remembers what was asked for."""
        made = super().scenes(*args, **shares)
        self.known |= {scene.caption: scene for scene in made}
        return made

    def draw(self, prompts: Sequence[str], **sampling: Any) -> np.ndarray:
        """The real thing, or white."""
        if self.is_blank:
            return np.full((len(prompts), 256, 256, 3), 255, dtype=np.uint8)
        by_label = {one.label: one for one in self.corpus.drawings}
        by_prompt = {self.prompt_of(one): one for one in self.corpus.drawings}
        by_prompt |= {one.text: by_label[one.label] for one in bundled_paraphrases() if one.label in by_label}
        return np.concatenate(
            [
                self.real([self.known[prompt]]) if prompt in self.known else self.on_white([by_prompt[prompt]])
                for prompt in prompts
            ]
        )


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    pipe = Pipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


WAYS = ("left and right", "above and below")


def examine(pipe: Pipeline, folder: Path, *, is_blank: bool, num_styles: int) -> dict[str, Figure]:
    write_corpus(folder, 256, num_styles)
    drawer = Drawer(pipe=pipe, corpus=load_corpus(folder), num_prompts=12, is_blank=is_blank)
    return {figure.name: figure for figure in drawer.figures()}


COMPOSED = (
    "background colour",
    "number of things",
    "one big or small thing",
    "one thing at a side",
    *(f"relation of two things, {way}" for way in WAYS),
)


@pytest.mark.soak
def test_a_perfect_drawer_reaches_every_ceiling(pipe: Pipeline, tmp_path: Path) -> None:
    figures = examine(pipe, tmp_path / "corpus", is_blank=False, num_styles=2)
    for name in COMPOSED[:4]:
        assert figures[name].value == figures[name].ceiling == 1.0, name
    for name in COMPOSED[4:]:
        # Six labels repeat captions, and the drawer keeps one scene of each; the scorer does not know squares either.
        assert figures[name].value == pytest.approx(figures[name].ceiling, abs=0.35), name
        assert figures[name].value > 0
    assert figures["text match, share of real art's"].value in {None, 1.0}
    assert figures["nearest drawing is the right one"].value == 1.0
    assert figures["nearest drawing is the right one, paraphrases"].value == 1.0
    assert figures["style"].value == 1.0
    rebuilt = [figure for name, figure in figures.items() if name.endswith(", reconstructions")]
    assert len(rebuilt) == 2, "one per style"
    assert all(figure.value > figure.ceiling for figure in rebuilt), "a tokenizer loses something"
    assert figures["the same drawing, PSNR dB at 64 px"].value == 100.0
    assert figures["held-out pairs of concept and style"].value is not None


@pytest.mark.soak
def test_a_blank_drawer_fails_them(pipe: Pipeline, tmp_path: Path) -> None:
    figures = examine(pipe, tmp_path / "corpus", is_blank=True, num_styles=1)
    assert figures["background colour"].value < 0.5
    for name in COMPOSED[1:]:
        assert (figures[name].value, figures[name].verdict) == (0.0, "missed" if figures[name].target else "")
    assert figures["nearest drawing is the right one"].value <= 1 / 5
    for name in ("style", "held-out pairs of concept and style"):
        assert figures[name].value is None
        assert "one style" in figures[name].note


def test_verdicts_follow_the_side_of_the_target() -> None:
    assert Figure(name="a", value=0.8, target=0.8).cells() == ("a", "80%", "-", ">= 80%", "met", "")
    assert Figure(name="a", value=21.0, target=20.0, is_share=False, lower_is_better=True).verdict == "missed"
    assert Figure(name="a", value=None, target=0.5).verdict == ""


def test_too_few_prompts_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 256)
    with pytest.raises(FoveateError, match="--prompts must be at least 8, got 3"):
        Examiner(pipe=pipe, corpus=load_corpus(tmp_path / "corpus"), num_prompts=3)
