"""Parts that take turns on the device: order, residency, the same bits, and order again behind every failure.

There is no second device here, so moving home takes the weights out of a module and moving to the device puts them
back: whatever works while it should be at home cannot go unnoticed.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveate.core.errors import FoveateError
from foveate.families.loading import LoadedModel
from foveate.families.offload import CODEBOOK, DECODER, HOME, TEXT_ENCODER, TRANSFORMER, Offload, parts_of
from foveate.models.var import VAR
from foveate.pipeline.pipeline import Pipeline
from foveate.tokenizers.autoencoder import Autoencoder
from tests.pipeline.test_published import TOY_VAR, VQ, filled

DEVICE = torch.device("meta")
"""Stands for the device that draws; nothing is really moved there."""


class Parking:
    """Moves modules by taking their weights away, and notes which parts are on the device after every move."""

    def __init__(self, fails_to_bring: nn.Module | None = None) -> None:
        self.weights: dict[nn.Parameter, torch.Tensor] = {}
        self.there: set[nn.Module] = set()
        self.history: list[tuple[str, nn.Module]] = []
        self.fails_to_bring = fails_to_bring

    def __call__(self, module: nn.Module, device: torch.device) -> None:
        assert device in (HOME, DEVICE)
        if device == DEVICE and module is self.fails_to_bring:
            raise RuntimeError("the device is out of memory")
        is_home = device == HOME
        self.history.append(("home" if is_home else "device", module))
        (self.there.discard if is_home else self.there.add)(module)
        for parameter in module.parameters():
            if is_home and parameter not in self.weights:
                self.weights[parameter] = parameter.data
                parameter.data = parameter.data.new_empty(0)
            elif not is_home and parameter in self.weights:
                parameter.data = self.weights.pop(parameter)


class Parked:
    """A pipeline whose parts are parked, and the names of the parts that came to the device, in order."""

    def __init__(self, folder: Path, fails_to_bring: str | None = None, **options: Any) -> None:
        model = Pipeline.from_pretrained(folder, **options).model
        self.parts = parts_of(model)
        self.move = Parking(self.parts[fails_to_bring][0] if fails_to_bring else None)
        self.pipe = Pipeline(model, offload=Offload(self.parts, DEVICE, self.move))

    @property
    def there(self) -> set[str]:
        return {name for name, modules in self.parts.items() if modules and self.move.there.issuperset(modules)}

    def came(self) -> list[str]:
        """Names in the order of their first module's arrivals."""
        first = {modules[0]: name for name, modules in self.parts.items() if modules}
        return [first[module] for way, module in self.move.history if way == "device" and module in first]


@pytest.fixture
def var_folder(tmp_path: Path) -> Iterator[Path]:
    torch.save(filled(VAR(TOY_VAR)).state_dict(), tmp_path / "var_toy.pth")
    torch.save(filled(Autoencoder(VQ), 2).state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    return tmp_path  # type: ignore[return-value]


def pixels(pipe: Pipeline, prompt: str = "a red cat", **options: Any) -> torch.Tensor:
    images = pipe(prompt, seed=3, output_type="pt", **options).images
    assert isinstance(images, torch.Tensor)
    return images


def test_text_encoder_transformer_and_decoder_take_turns(toy_folder: Path, toy_pipe: Pipeline) -> None:
    parked = Parked(toy_folder)
    assert not parked.there
    seen: list[set[str]] = []
    images = pixels(
        parked.pipe, negative_prompt="a dog", callback_on_step_end=lambda *_args: seen.append(set(parked.there))
    )
    assert torch.equal(images, pixels(toy_pipe, negative_prompt="a dog"))
    assert seen == [{TRANSFORMER}] * 7
    assert parked.came() == [TEXT_ENCODER, TRANSFORMER, DECODER]
    assert not parked.there
    # What leaves goes before what comes, so that both never need room together.
    held = 0
    for way, module in parked.move.history[len(parked.parts) + 1 :]:
        size = sum(1 for _ in module.parameters())
        held += size if way == "device" else -size
        assert held <= max(sum(1 for m in ms for _ in m.parameters()) for ms in parked.parts.values())
    assert torch.equal(pixels(parked.pipe), pixels(toy_pipe))


def test_no_decoder_comes_where_nothing_is_decoded(toy_folder: Path) -> None:
    parked = Parked(toy_folder)
    parked.pipe("a cat", seed=1, output_type="latent")
    assert parked.came() == [TEXT_ENCODER, TRANSFORMER]
    assert not parked.there


def test_the_codebook_of_a_vq_model_is_there_with_the_transformer(var_folder: Path) -> None:
    parked = Parked(var_folder)
    seen: list[set[str]] = []
    images = pixels(parked.pipe, "volcano", callback_on_step_end=lambda *_args: seen.append(set(parked.there)))
    assert torch.equal(images, pixels(Pipeline.from_pretrained(var_folder), "volcano"))
    assert seen == [{TRANSFORMER, CODEBOOK}] * 10
    assert parked.came() == [TRANSFORMER, CODEBOOK, DECODER]


@pytest.mark.parametrize("previews", [0, 1, 3, 100])
def test_with_previews_the_decoder_joins_the_transformer(toy_folder: Path, toy_pipe: Pipeline, previews: int) -> None:
    parked = Parked(toy_folder)
    there: list[set[str]] = []
    for event, wanted in zip(
        parked.pipe.stream("a red cat", previews=previews, seed=3, output_type="pt"),
        toy_pipe.stream("a red cat", previews=previews, seed=3, output_type="pt"),
        strict=True,
    ):
        there.append(set(parked.there))
        assert (event.images is None) == (wanted.images is None)
        assert event.images is None or torch.equal(event.images, wanted.images)  # type: ignore[arg-type]
    shown = min(max(previews - 1, 0), 6)
    assert there == [{TRANSFORMER}] * (6 - shown) + [{TRANSFORMER, DECODER}] * shown + [{DECODER}]
    # Every part moves once, however many images are shown.
    assert parked.came() == [TEXT_ENCODER, TRANSFORMER, DECODER]
    assert not parked.there


def test_a_released_text_encoder_needs_no_turn(toy_folder: Path, toy_pipe: Pipeline) -> None:
    parked = Parked(toy_folder, release_text_encoder=True)
    assert parked.parts[TEXT_ENCODER] == []
    assert torch.equal(pixels(parked.pipe), pixels(toy_pipe))
    assert parked.came() == [TRANSFORMER, DECODER]


def test_everything_is_home_behind_a_cancel_and_an_error(toy_folder: Path, toy_pipe: Pipeline) -> None:
    parked = Parked(toy_folder)

    def fail(*_args: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        parked.pipe("a cat", seed=1, callback_on_step_end=fail)
    assert not parked.there
    events = parked.pipe.stream("a cat", previews=7, seed=1)
    next(events)
    assert parked.there == {TRANSFORMER, DECODER}
    events.close()
    assert not parked.there
    assert torch.equal(pixels(parked.pipe), pixels(toy_pipe))


@pytest.mark.parametrize("part", [TEXT_ENCODER, TRANSFORMER, DECODER])
def test_a_part_that_finds_no_room_leaves_everything_home(toy_folder: Path, toy_pipe: Pipeline, part: str) -> None:
    parked = Parked(toy_folder, fails_to_bring=part)
    with pytest.raises(RuntimeError, match="out of memory"):
        pixels(parked.pipe)
    assert not parked.there
    parked.move.fails_to_bring = None
    assert torch.equal(pixels(parked.pipe), pixels(toy_pipe))


def test_two_streams_of_one_pipeline_do_not_disturb_each_other(toy_folder: Path, toy_pipe: Pipeline) -> None:
    parked = Parked(toy_folder)
    streams = [parked.pipe.stream(text, previews=2, seed=3, output_type="pt") for text in ("a red cat", "a blue dog")]
    for events in zip(*streams, strict=True):
        last = events
    for event, text in zip(last, ("a red cat", "a blue dog"), strict=True):
        assert event.output is not None
        assert torch.equal(event.output.images, pixels(toy_pipe, text))  # type: ignore[arg-type]
    assert not parked.there


def test_a_part_stays_where_it_works_while_another_thread_wants_the_device() -> None:
    parts = {"one": [nn.Linear(1, 1)], "other": [nn.Linear(1, 1)]}
    there: list[str] = []

    def move(module: nn.Module, device: torch.device) -> None:
        name = next(name for name, modules in parts.items() if module in modules)
        there.remove(name) if device.type == "cpu" and name in there else there.append(name)

    offload = Offload(parts, torch.device("meta"), move)
    there.clear()

    def take() -> None:
        with offload.working("other"):
            assert there == ["other"]

    with offload.working("one"):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert there == ["one"]
    thread.join()
    assert there == ["other"]


def test_a_call_that_ends_inside_another_ones_work_sends_nothing_home() -> None:
    there: set[str] = set()
    parts = {"one": [nn.Linear(1, 1)], "other": [nn.Linear(1, 1)]}

    def move(module: nn.Module, device: torch.device) -> None:
        name = next(name for name, modules in parts.items() if module in modules)
        (there.discard if device.type == "cpu" else there.add)(name)

    offload = Offload(parts, torch.device("meta"), move)
    with offload.working("one"):
        with offload.working():
            assert there == {"one"}
        with offload.working("other"):
            assert there == {"one", "other"}
        assert "one" in there
    with offload.working():
        assert not there


def test_moves_inside_inference_mode_leave_ordinary_weights(toy_folder: Path, toy_pipe: Pipeline) -> None:
    model = Pipeline.from_pretrained(toy_folder).model
    parts = parts_of(model)
    offload = Offload(parts, torch.device("cpu"), lambda module, device: module.to(torch.float64).to(torch.float32))
    with torch.inference_mode():
        offload.bring(TRANSFORMER)
    assert not any(p.is_inference() for modules in parts.values() for module in modules for p in module.parameters())


def test_parts_are_whole_and_disjoint(toy_pipe: Pipeline, var_folder: Path) -> None:
    for model in (toy_pipe.model, Pipeline.from_pretrained(var_folder).model):
        parts = parts_of(model)
        found = [p for modules in parts.values() for module in modules for p in module.parameters()]
        assert len(found) == len(set(found))
        autoencoder = model.tokenizer.autoencoder  # type: ignore[attr-defined]
        wanted = {*model.transformer.parameters(), *autoencoder.parameters()}  # type: ignore[attr-defined]
        assert set(found) >= wanted


def test_cuda_graphs_need_a_gpu(toy_pipe: Pipeline) -> None:
    with pytest.raises(FoveateError, match='load it with device="cuda", or leave them out'):
        toy_pipe.enable_cuda_graphs()


def test_offload_needs_a_device_beside_main_memory(toy_folder: Path, toy_pipe: Pipeline) -> None:
    for call in (
        toy_pipe.enable_model_cpu_offload,
        lambda: Pipeline.from_pretrained(toy_folder, offload=True),
        lambda: Pipeline.from_pretrained("no such model", offload=True),
    ):
        with pytest.raises(FoveateError, match='needs a pipeline on a GPU; .* load it with device="cuda", or leave'):
            call()


def test_enabling_sends_a_loaded_model_home_once(
    toy_folder: Path, toy_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    parkings: list[Parking] = []

    def of(model: LoadedModel) -> Offload:
        assert model.device == DEVICE
        parkings.append(Parking())
        return Offload(parts_of(model), DEVICE, parkings[-1])

    monkeypatch.setattr(Offload, "of", of)
    pipe = Pipeline(replace(Pipeline.from_pretrained(toy_folder).model, device=DEVICE))
    for _ in range(2):
        pipe.enable_model_cpu_offload()
    (parking,) = parkings
    assert [type(module).__name__ for _, module in parking.history] == ["MiniLM", "Infinity", "Encoder", "Decoder"]
    assert {way for way, _ in parking.history} == {"home"}
    assert torch.equal(pixels(pipe), pixels(toy_pipe))
