"""Places and sizes of things: marks are added where one is given, and nothing else changes."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.conditioning.minilm import MiniLM, MiniLMConfig, TextEncoder
from foveate.conditioning.places import CLASSES, NUM_AXES, PLACES_NAME, Places, PlacesConfig
from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.minilm import MINILM, MINILM_PLACES
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.random_weights import fill_randomly
from tests.conftest import toy_text_encoder

TEXTS = ["a red cat", "cat", "a big red cat on a blue mat"]


def make_places(seed: int = 3) -> Places:
    width = toy_text_encoder().model.config.width
    places = Places(PlacesConfig(text_width=width, tap=1, width=16, num_heads=2, num_blocks=1))
    fill_randomly(places, seed=seed)
    places.outward.weight.data *= 20
    return places.requires_grad_(requires_grad=False).eval()


@pytest.fixture
def encoder() -> TextEncoder:
    return replace(toy_text_encoder(), places=make_places())


def say(places: Places, column: int) -> None:
    """Lets every token have one class along all axes: 0 is above, left and small, 1 none, 2 below, right and big."""
    places.outward.weight.data.zero_()
    places.outward.bias.data = torch.tensor([10.0 * (own == column) for own in range(CLASSES)] * NUM_AXES)


@pytest.mark.parametrize(("column", "sign"), [(0, -1.0), (1, 0.0), (2, 1.0)])
def test_marks_are_added_to_tokens_and_never_to_the_sentence(encoder: TextEncoder, column: int, sign: float) -> None:
    assert encoder.places is not None
    say(encoder.places, column)
    plain = replace(encoder, places=None)
    for marked_TE, x_TE in zip(encoder.encode(TEXTS), plain.encode(TEXTS), strict=True):
        assert torch.equal(marked_TE[0], x_TE[0])
        torch.testing.assert_close(marked_TE[1:], x_TE[1:] + sign * encoder.places.direction_AE.sum(0))
        assert torch.equal(marked_TE, x_TE) == (column == 1), "a prompt without places keeps its features bit for bit"
    assert torch.equal(encoder.pooled(TEXTS), plain.pooled(TEXTS))


def slow_places(encoder: TextEncoder, text: str) -> Tensor:
    """The classes of every token along y, x and size, from the blocks one by one."""
    places = encoder.places
    assert places is not None
    ids_BT = torch.tensor([encoder.tokenizer.encode(text).ids])
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    x_BTE = encoder.model.embeddings(ids_BT)
    for index in range(places.config.tap):
        x_BTE = encoder.model.encoder.layer[index](x_BTE, mask_BT)
    y_BTF = places.inward(x_BTE)
    for block in places.blocks:
        y_BTF = block(y_BTF, mask_BT)
    best = [[int(scores.argmax()) - 1 for scores in row.split(CLASSES)] for row in places.outward(y_BTF)[0]]
    return torch.tensor(best)


@pytest.mark.parametrize("seed", range(5))
def test_marks_agree_with_their_slow_twin(encoder: TextEncoder, seed: int) -> None:
    encoder = replace(encoder, places=make_places(seed))
    assert encoder.places is not None
    plain = replace(encoder, places=None)
    for text, marked_TE, x_TE in zip(TEXTS, encoder.encode(TEXTS), plain.encode(TEXTS), strict=True):
        expected_TE = slow_places(encoder, text).float() @ encoder.places.direction_AE
        torch.testing.assert_close(marked_TE[1:] - x_TE[1:], expected_TE[1:], rtol=1e-4, atol=1e-5)


def test_alone_equals_batch_and_padding_does_not_leak(encoder: TextEncoder) -> None:
    for text, own, padded in zip(TEXTS, encoder.encode(TEXTS), encoder.encode_together(TEXTS), strict=True):
        assert torch.equal(encoder.encode([text])[0], own)
        torch.testing.assert_close(padded, own, rtol=1e-4, atol=1e-4)


def test_save_and_load(encoder: TextEncoder, tmp_path: Path) -> None:
    assert encoder.places is not None
    encoder.save(tmp_path, quantise=False)
    loaded = TextEncoder.from_folder(tmp_path)
    assert loaded.places is not None
    assert loaded.places.config == encoder.places.config
    assert not any(p.requires_grad for p in loaded.places.parameters())
    for name, w in loaded.places.state_dict().items():
        assert torch.equal(w, encoder.places.state_dict()[name].half().float())
    replace(encoder, places=None).save(tmp_path)
    assert TextEncoder.from_folder(tmp_path).places is None, "an encoder without places leaves none behind"


@pytest.mark.parametrize("damage", ["junk", "no config", "another config", "a tensor less", "width"])
def test_a_damaged_file_is_named_in_one_line(encoder: TextEncoder, tmp_path: Path, damage: str) -> None:
    encoder.save(tmp_path)
    assert encoder.places is not None
    file, config = tmp_path / PLACES_NAME, asdict(encoder.places.config)
    weights = load_file(file)
    if damage == "junk":
        file.write_bytes(b"no weights")
    elif damage == "a tensor less":
        save_file({k: w for k, w in weights.items() if k != "inward.bias"}, file, {"config": json.dumps(config)})
    else:
        metadata = {
            "no config": {},
            "another config": {"config": '{"colour": 1}'},
            "width": {"config": json.dumps(config | {"width": 15})},
        }[damage]
        save_file(weights, file, metadata)
    with pytest.raises(CheckpointError, match=f"{PLACES_NAME}: not a readable position tagger") as caught:
        TextEncoder.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_places_of_another_encoder_are_refused() -> None:
    encoder = toy_text_encoder()
    for config in (
        PlacesConfig(text_width=encoder.model.config.width + 1, tap=1),
        PlacesConfig(text_width=encoder.model.config.width, tap=encoder.model.config.num_blocks + 1),
    ):
        with pytest.raises(FoveateError, match="the position tagger must fit the encoder"):
            replace(encoder, places=Places(config))


@pytest.mark.parametrize(("name", "value"), [("tap", 0), ("width", 30)])
def test_sizes_are_checked(name: str, value: int) -> None:
    with pytest.raises(FoveateError, match=f"{name} must be"):
        PlacesConfig(**{name: value})


def folder_with(toy_folder: Path, to: Path, conditioner: str, places: Places | None) -> Path:
    folder = shutil.copytree(toy_folder, to)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"conditioner": conditioner}), encoding="utf-8")
    if places is not None:
        places.save(folder)
    return folder


def test_a_model_that_was_taught_with_places_draws_with_them(toy_folder: Path, tmp_path: Path) -> None:
    places = make_places()
    say(places, 2)
    places.direction_AE.data *= 50
    folder = folder_with(toy_folder, tmp_path / "marked", "minilm-places", places)
    marked, plain = Pipeline.from_pretrained(folder), Pipeline.from_pretrained(toy_folder)
    assert marked.model.sha256 != plain.model.sha256
    one, other = (pipe("a red cat", seed=1).images[0].tobytes() for pipe in (marked, plain))
    assert one != other
    released = Pipeline.from_pretrained(folder, release_text_encoder=True)
    assert released("a red cat", seed=1).images[0].tobytes() == one


@pytest.mark.parametrize(("conditioner", "has_file", "fault"), [
    ("minilm-places", False, "needs text_places.safetensors"),
    ("minilm", True, "takes no text_places.safetensors"),
])  # fmt: skip
def test_places_and_their_model_belong_together(
    toy_folder: Path, tmp_path: Path, conditioner: str, has_file: bool, fault: str
) -> None:
    folder = folder_with(toy_folder, tmp_path / "odd", conditioner, make_places() if has_file else None)
    with pytest.raises(CheckpointError, match=fault):
        Pipeline.from_pretrained(folder)


def test_the_parameters_of_memory_are_those_of_the_encoder() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in module.parameters()) for module in (MiniLM(MiniLMConfig()), Places(PlacesConfig()))
        ]
    assert MINILM.parameters == counts[0]
    assert MINILM_PLACES.parameters == sum(counts)
