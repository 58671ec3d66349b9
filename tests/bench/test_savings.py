"""Ablation: switching a saving off changes the cost of an image, not the image, and leaves nothing behind."""

import sys

import pytest
import savings
import torch

from foveate.pipeline.pipeline import Pipeline


def latent(pipe: Pipeline) -> torch.Tensor:
    return pipe("a red cat", seed=3, output_type="latent").images


@pytest.mark.parametrize("saving", savings.SAVINGS, ids=lambda saving: saving.name)
def test_the_picture_stays_the_same(toy_pipe: Pipeline, saving: savings.Saving) -> None:
    before = latent(toy_pipe)
    with saving.undo():
        undone = latent(toy_pipe)
    # Bits that tie within float error may flip; a wrong undo changes nearly all of them.
    assert (undone != before).float().mean() < 0.02
    assert torch.equal(latent(toy_pipe), before)


def test_undoing_reaches_the_engine(toy_pipe: Pipeline) -> None:
    by_name = {saving.name: saving for saving in savings.SAVINGS}
    plain = toy_pipe("a red cat", seed=3).report.kv_bytes_peak
    with by_name["no cache for the last scale"].undo():
        assert toy_pipe("a red cat", seed=3).report.kv_bytes_peak > plain


@pytest.mark.parametrize("saving", savings.SAVINGS, ids=lambda saving: saving.name)
def test_undoing_replaces_something_that_a_picture_uses(toy_pipe: Pipeline, saving: savings.Saving) -> None:
    """What takes the place of a saving is called: a name that nothing looks up any more would pass all other tests."""
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == savings.__file__

    with saving.undo():
        sys.setprofile(count)
        try:
            latent(toy_pipe)
        finally:
            sys.setprofile(None)
    assert calls > 0


def test_a_row_names_the_saving_and_its_ratio(toy_pipe: Pipeline) -> None:
    found = savings.measure(toy_pipe, "0.06M", savings.SAVINGS[2], runs=1, warmup=0)
    assert savings.line(found).startswith("| norm and modulation in one pass |")
    assert found["ratio"]["median"] == pytest.approx(found["ms_without"]["median"] / found["ms"]["median"])
