"""Model folders: their version, and a text encoder that several of them share."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.core.errors import CheckpointError
from foveate.families.loading import Origin, find_folder
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.folder import FORMAT, folder_sha256, read_config, save_folder, text_encoder_folder
from tests.conftest import TOY_SPEC, toy_autoencoder, toy_text_encoder, toy_transformer

TEXT_FILES = ("text_encoder.safetensors", "tokenizer.json")


def save_sharing(folder: Path, text_encoder: str) -> None:
    save_folder(
        folder, config=TOY_SPEC.to_json(), transformer=toy_transformer(), autoencoder=toy_autoencoder(),
        text_encoder=text_encoder, notice="A toy.\n", model_card="# toy\n", dtype=torch.float32,
    )  # fmt: skip


def with_config(toy_folder: Path, folder: Path, **changed: object) -> Path:
    shutil.copytree(toy_folder, folder)
    (folder / "config.json").write_text(json.dumps({**TOY_SPEC.to_json(), **changed}))
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder whose text encoder lies beside it."""
    toy_text_encoder().save(tmp_path / "text-1.0")
    save_sharing(tmp_path / "model", "../text-1.0")
    return tmp_path / "model"


def test_a_shared_text_encoder_keeps_image_and_hash(shared: Path, toy_folder: Path, toy_pipe: Pipeline) -> None:
    assert not [name for name in TEXT_FILES if (shared / name).exists()]
    assert text_encoder_folder(shared).resolve() == (shared.parent / "text-1.0").resolve()
    assert text_encoder_folder(toy_folder) == toy_folder
    pipe = Pipeline.from_pretrained(shared)
    assert pipe.model.sha256 == toy_pipe.model.sha256 == folder_sha256(shared)
    own, ours = (one("a red cat", seed=1).images[0] for one in (toy_pipe, pipe))
    assert np.array_equal(np.asarray(own), np.asarray(ours))
    released = Pipeline.from_pretrained(shared, release_text_encoder=True)
    assert np.array_equal(np.asarray(released("a red cat", seed=1).images[0]), np.asarray(ours))


def test_the_hash_follows_the_shared_text_encoder_alone(shared: Path) -> None:
    before = folder_sha256(shared)
    # What an earlier save left in the folder, and other models beside the encoder, are read by nobody.
    (shared / "text_encoder.safetensors").write_bytes(b"left over")
    (shared.parent / "text-1.0" / "transformer.safetensors").write_bytes(b"of another model")
    assert folder_sha256(shared) == before
    with (shared.parent / "text-1.0" / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert folder_sha256(shared) != before


def test_the_hash_of_the_bundled_model_is_the_one_in_its_images() -> None:
    wanted = "b8ba0dfd127b33688e7a68f929f52865ee509a74075624585e1bb156d7f52c1f"
    assert folder_sha256(find_folder(Origin(name_or_path="emoji-tiny"))) == wanted


@pytest.mark.parametrize(
    "named",
    ["/etc", "../../minilm", "..", "../", "../..", "../a/b", ".", "minilm", "C:/minilm", "..\\minilm", "", 3, ["a"]],
)
def test_a_text_encoder_lies_beside_its_model(toy_folder: Path, tmp_path: Path, named: object) -> None:
    folder = with_config(toy_folder, tmp_path / "model", text_encoder=named)
    with pytest.raises(CheckpointError, match=r"config\.json: text_encoder must be a folder beside .*\.\./NAME, got"):
        Pipeline.from_pretrained(folder)
    if isinstance(named, str):
        with pytest.raises(CheckpointError, match="text_encoder must be a folder beside"):
            save_sharing(tmp_path / "new", named)
        assert not (tmp_path / "new").exists()


def test_a_missing_text_encoder_is_named(shared: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "text-1.0")
    with pytest.raises(CheckpointError, match=r"config\.json: no folder \.\./text-1\.0 for the text encoder; copy it"):
        Pipeline.from_pretrained(shared)
    with pytest.raises(CheckpointError, match=r"no folder \.\./text-1\.0"):
        save_sharing(tmp_path / "new", "../text-1.0")
    assert not (tmp_path / "new").exists()


def test_a_later_format_asks_for_an_upgrade(toy_folder: Path, tmp_path: Path) -> None:
    folder = with_config(toy_folder, tmp_path / "model", format=FORMAT + 1, colour=3)
    with pytest.raises(CheckpointError) as caught:
        Pipeline.from_pretrained(folder)
    said = f"{folder / 'config.json'}: format 2 is newer than 1, the one that this release reads; upgrade foveate"
    assert str(caught.value) == said
    assert read_config(toy_folder)["format"] == FORMAT
