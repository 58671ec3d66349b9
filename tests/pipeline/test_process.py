"""The caller's process: none of its settings changes a bit of an image, and no call changes any of them."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from tests.engine.test_invariants import ACTIVE
from tests.models import test_switti
from tests.randomness import few
from tests.toys import GRIDS, cached_run, label_request, make_request, run, same_bits, toy, toy_var


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def everything() -> Iterator[None]:
    with (
        default_dtype(torch.float64),
        default_device("meta"),
        np.errstate(all="raise"),
        torch.enable_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "everything": everything,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16 of autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
}


@pytest.mark.parametrize(
    "spec", few(ACTIVE, "ld-pruning|depthvar", "late-bfloat16", "skipvar", "sparsevar:threshold=0.995,stride=3", more=3)
)
def test_no_setting_around_a_run_changes_a_bit(spec: str):
    """Each policy on one of the toys."""
    name = list(GRIDS)[ACTIVE.index(spec) % len(GRIDS)]
    expected, request = cached_run(spec, name), make_request(toy(name).schedule)
    with everything():
        found = run(toy(name), load_policy(spec), request)
    assert same_bits(expected, found)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["var", "switti"])
def test_no_setting_changes_another_family(setting: str, family: str):
    if family == "var":
        subject = toy_var()
        request = label_request(subject.schedule)
    else:
        subject = test_switti.subject_of(use_ar=False, ff_width=192)
        request = test_switti.request_of(subject, [1, 2], [3, 5])
    expected = run(subject, load_policy("ld-pruning"), request)
    with SETTINGS[setting]():
        assert same_bits(expected, run(subject, load_policy("ld-pruning"), request))


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_around_loading_and_drawing_changes_a_pixel(setting: str, toy_folder: Path):
    """Weights, text encoder, transformer and decoder: a pipeline made and called inside equals one of before."""
    options = {"seed": 3, "policy": "ld-pruning|depthvar", "output_type": "np", "negative_prompt": "a dog"}
    expected = Pipeline.from_pretrained(toy_folder)("a red cat", **options).images
    with SETTINGS[setting]():
        pipe = Pipeline.from_pretrained(toy_folder)
        assert np.array_equal(pipe("a red cat", **options).images, expected)
    assert np.array_equal(pipe("a red cat", **options).images, expected)


def test_no_setting_changes_a_pixel_of_the_bundled_model():
    """All at once, as its text encoder and the reader of places load by code of their own."""
    expected = Pipeline.from_pretrained("emoji-tiny")("an owl on the left of a car", seed=3, output_type="np").images
    with everything():
        pipe = Pipeline.from_pretrained("emoji-tiny")
        assert np.array_equal(pipe("an owl on the left of a car", seed=3, output_type="np").images, expected)


def settings_of_process(generator: torch.Generator) -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        generator.get_state().numpy().tobytes(),
        pickle.dumps(np.random.get_state()),
        np.geterr(),
    )


@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_no_call_changes_a_setting_of_the_process(rng: str, toy_folder: Path):
    """Nor does it take numbers from a global generator."""
    before = settings_of_process(torch.default_generator)
    pipe = Pipeline.from_pretrained("emoji-tiny" if rng == "keyed" else toy_folder)
    pipe(["a red cat", "a dog"], seed=1, rng=rng, policy="ld-pruning")
    for _ in pipe.stream("a red cat", seed=1, rng=rng):
        pass
    assert settings_of_process(torch.default_generator) == before
