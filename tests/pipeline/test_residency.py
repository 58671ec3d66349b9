"""Text encoders that are in memory only while they work."""

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveate.bench.memory import weights_bytes
from foveate.conditioning.on_demand import OnDemand
from foveate.conditioning.t5 import T5Text
from foveate.core.conditions import ClassLabel
from foveate.core.errors import CheckpointError
from foveate.families import loading
from foveate.models.infinity import Infinity
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder
from tests.conftest import toy_text_encoder
from tests.pipeline.test_published import BSQ, TOY_INFINITY, filled


def latents(pipe: Pipeline, prompts: list[str], **options: Any) -> torch.Tensor:
    images = pipe(prompts, seed=5, output_type="latent", **options).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[nn.Module]"]:
    """The networks of all text encoders that are read, as long as anything holds them."""
    read: list[weakref.ref[nn.Module]] = []
    real = loading.read_text_encoder

    def noted(*args: Any, **options: Any) -> Any:
        encoder = real(*args, **options)
        read.append(weakref.ref(encoder.model))
        return encoder

    monkeypatch.setattr(loading, "read_text_encoder", noted)
    return read


def test_a_released_text_encoder_is_read_once_a_call_and_gone_behind_it(
    toy_folder: Path, toy_pipe: Pipeline, encoders: list["weakref.ref[nn.Module]"]
) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, release_text_encoder=True)
    prompts = ["a red cat", "a blue dog", "a red cat"]
    for count, (texts, negative) in enumerate(
        [(prompts, "a house"), (prompts, "a house"), (["a red cat"], "a house"), (["two apples"], None)]
    ):
        wanted = latents(toy_pipe, texts, negative_prompt=negative)
        assert torch.equal(latents(pipe, texts, negative_prompt=negative), wanted)
        # Once at loading and once for the first call; the next two know their prompts, the last one is new.
        assert len(encoders) == (2, 2, 2, 3)[count]
        gc.collect()
        assert not any(encoder() is not None for encoder in encoders)
    assert weights_bytes(pipe.model)["text_encoder"] == 0
    assert weights_bytes(toy_pipe.model)["text_encoder"] > 0


def test_only_the_prompts_of_the_last_call_are_kept(toy_folder: Path, encoders: list["weakref.ref[nn.Module]"]) -> None:
    pipe = Pipeline.from_pretrained(toy_folder, release_text_encoder=True)
    for prompt in ("a cat", "a dog", "a cat"):
        pipe(prompt, seed=1, output_type="latent")
    assert len(encoders) == 4


def test_a_call_that_another_thread_overtakes_gets_its_own_conditions() -> None:
    inner = OnDemand(load=Lengths, device=torch.device("cpu"))

    class Overtaken(OnDemand):
        """Another call ends whenever this one has noted its own."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if name == "_last" and value:
                super().__setattr__("_last", {})

    assert Overtaken(load=Lengths, device=inner.device).encode(["a", "bcd"]) == inner.encode(["a", "bcd"])


class Lengths:
    """A conditioner that says how long a prompt is."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def encode(self, prompts: list[str]) -> list[ClassLabel]:
        """One label per prompt."""
        return [ClassLabel(index=len(prompt)) for prompt in prompts]

    def num_cut(self, prompt: str) -> int:
        return 0


@pytest.mark.parametrize("name", ["text_encoder.safetensors", "tokenizer.json"])
def test_a_missing_text_encoder_is_said_at_loading(toy_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(toy_folder, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"needs {name}, no such file"):
        Pipeline.from_pretrained(folder, release_text_encoder=True)


@pytest.mark.soak
def test_published_text_encoders_are_released_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(filled(Infinity(TOY_INFINITY)).state_dict(), tmp_path / "tuned.pth")
    torch.save(filled(Autoencoder(BSQ), 3).state_dict(), tmp_path / "vae.pth")
    read: list[object] = []

    def load(place: object, **_kwargs: object) -> object:
        read.append(place)
        return toy_text_encoder()

    monkeypatch.setattr(T5Text, "from_pretrained", load)
    resident, released = (
        Pipeline.from_pretrained(tmp_path / "tuned.pth", text_encoder="someone/text", release_text_encoder=flag)
        for flag in (False, True)
    )
    assert torch.equal(latents(released, ["a red cat"]), latents(resident, ["a red cat"]))
    assert read == ["someone/text"] * 3
