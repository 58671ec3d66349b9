"""A text encoder that reads a prompt once: the same conditions, the last prompts kept."""

import pytest
import torch

from foveate.conditioning.remembered import Remembered
from foveate.conditioning.text import RandomText
from foveate.core.errors import FoveateError
from foveate.families import moving
from foveate.pipeline.pipeline import Pipeline, stack_uint8


class Counted:
    """Says what it read."""

    def __init__(self) -> None:
        self.inner = RandomText(width=8, max_tokens=4, device=torch.device("cpu"))
        self.read: list[list[str]] = []

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        self.read.append(prompts)
        return self.inner.encode(prompts)

    def num_cut(self, prompt: str) -> int:
        return self.inner.num_cut(prompt)


def test_a_prompt_is_read_once_while_it_is_kept() -> None:
    counted = Counted()
    text = Remembered(inner=counted, count=2)
    for prompts in (["a", "b", "a"], ["b"], ["c"], ["b", "a"]):
        found = text.encode(prompts)
        assert all(torch.equal(*pair) for pair in zip(found, counted.inner.encode(prompts), strict=True))
    assert counted.read == [["a", "b"], ["c"], ["a"]]
    assert text.num_cut("a b c d e") == counted.num_cut("a b c d e") == 3
    text.encode(["d", "e", "f"])
    assert text.encode(["d", "f"])
    assert counted.read[-1] == ["d", "e", "f"]
    with pytest.raises(FoveateError, match="1 or more, got 0"):
        Remembered(inner=counted, count=0)


def test_a_pipeline_that_remembers_has_the_same_images(toy_pipe: Pipeline) -> None:
    pipe = Pipeline(toy_pipe.model)
    pipe.remember_prompts(4)
    pipe.remember_prompts(4)
    assert not isinstance(pipe.model.text.inner, Remembered)
    for prompts in (["a red cat", "two dogs"], ["two dogs"]):
        both = [p(prompts, seed=3, policy="skip-scales:count=3").images for p in (pipe, toy_pipe)]
        assert (stack_uint8(both[0]) == stack_uint8(both[1])).all()
    assert not isinstance(toy_pipe.model.text, Remembered)


def test_a_pipeline_that_moved_reads_its_prompts_again() -> None:
    text = Remembered(inner=Counted(), count=2)
    text.encode(["a"])
    again = moving._with_device(text, torch.device("cpu"))
    again.encode(["a"])
    assert again.inner.read == [["a"], ["a"]]
