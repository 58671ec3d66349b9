"""Weights that are no numbers, or none in the dtype that is asked for, are refused where they are read, by name."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foveate.conditioning.minilm import TextEncoder
from foveate.conditioning.places import PLACES_NAME
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.finite import names_of_broken
from foveate.models.switti import Switti
from foveate.models.var import VAR
from foveate.pipeline.pipeline import Pipeline
from foveate.weights.files import read_weights, save_sharded
from foveate.weights.folder import read_network, read_text_encoder, save_folder
from foveate.weights.switti import load_switti
from foveate.weights.var import load_var
from tests.conditioning.test_places import make_places
from tests.conftest import TOY_SPEC, toy_autoencoder, toy_text_encoder, toy_transformer
from tests.models.test_checkpoint import assert_same, random_state
from tests.models.test_checkpoint_names import KINDS
from tests.models.test_checkpoint_var import CONFIGS
from tests.models.test_switti import CONFIG as SWITTI

CPU = torch.device("cpu")
INF, NAN = float("inf"), float("nan")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGES = {
    "doctype": b"<!DOCTYPE html>\n<html><title>Sign in</title></html>",
    "lower": b"<!doctype html><html>",
    "html": b"\n  <HTML lang='en'><body>404</body></HTML>",
    "marked": b"\xef\xbb\xbf<html>",
    "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
}


def spoilt(state: dict[str, Tensor], key: str, *values: float) -> dict[str, Tensor]:
    """The state with the last values of one weight replaced."""
    changed = state[key].clone()
    changed.flatten()[-len(values) :] = torch.tensor(values)
    return state | {key: changed}


def one_line(error: pytest.ExceptionInfo[FoveateError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((NAN,), "holds NaN at 1 of {n} values; the file is damaged or its training diverged: fetch it again"),
        ((-INF, INF), "holds infinity at 2 of {n} values"),
        ((INF, NAN), "holds NaN at 1 and infinity at 1 of {n} values"),
    ],
)
def test_every_kind_refuses_what_is_no_number(kind: str, values: tuple[float, ...], said: str) -> None:
    build, load = KINDS[kind]
    state = random_state(build())
    for key in (min(state, key=lambda k: (state[k].numel() < 4, k)), max(state, key=lambda k: state[k].numel())):
        with pytest.raises(CheckpointError, match=f"^{re.escape(key)} {said.format(n=state[key].numel())}"):
            load(build(), spoilt(state, key, *values))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_refuses_what_overflows(kind: str) -> None:
    build, load = KINDS[kind]
    state = random_state(build())
    key = sorted(state)[-1]
    large = spoilt(state, key, -70000.0)
    said = f"^{re.escape(key)} reaches 70000, but float16 ends at 65504; take --dtype bfloat16 or float32$"
    with pytest.raises(CheckpointError, match=said):
        load(build(), large, dtype=torch.float16)
    for dtype in (torch.bfloat16, torch.float32):
        load(build(), large, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"reaches 3.4e\+38, but bfloat16 ends at 3.38953e\+38; take --dtype fl"):
        load(build(), spoilt(state, key, 3.4e38), dtype=torch.bfloat16)
    # The largest number of float16, and what is rounded to it.
    load(build(), spoilt(state, key, 65504.0, -65519.0), dtype=torch.float16)


def test_constant_masks_may_be_infinite() -> None:
    mask = torch.full((1, 1, 5, 5), -INF).triu(1)
    state = random_state(VAR(CONFIGS[0]))
    model = VAR(CONFIGS[0])
    load_var(model, state | {"attn_bias_for_masking": mask, "blocks.0.attn.zero_k_bias": torch.full((16,), NAN)})
    assert_same(model.state_dict(), state)
    switti = Switti(SWITTI)
    load_switti(switti, random_state(switti) | {"attn_bias_for_masking": mask}, dtype=torch.float16)


def test_the_check_knows_all_dtypes() -> None:
    bad = [(str(dtype), torch.tensor([1.0, NAN, 2.0]).to(dtype)) for dtype in
           (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)]  # fmt: skip
    good = [(f"good {name}", torch.nan_to_num(values.float()).to(values.dtype)) for name, values in bad]
    others = [("int", torch.tensor([2**62])), ("bool", torch.tensor([True])), ("none", torch.zeros(0, 3))]
    others.append(("large", torch.tensor([1.7e308, 1.7e308], dtype=torch.float64)))
    strided = torch.ones(4, 6)
    strided[1, 3] = INF
    assert names_of_broken([*good, *others, *bad, ("view", strided.T)]) == [*(name for name, _ in bad), "view"]
    assert names_of_broken([]) == []


def shards(state: dict[str, Tensor], folder: Path) -> Path:
    return save_sharded(state, folder, "t", max_bytes=8 * 1024)[-1]


def one_file(state: dict[str, Tensor], folder: Path) -> Path:
    return save_sharded(state, folder, "t")[0]


def pickle(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"trainer": {"var_wo_ddp": state}}, folder / "t.pth")
    return folder / "t.pth"


@pytest.mark.parametrize("write", [one_file, shards, pickle])
def test_the_file_is_named(write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path) -> None:
    state = random_state(VAR(CONFIGS[0]))
    key = "blocks.1.ffn.fc1.weight"
    path = write(spoilt(state, key, NAN), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_network(path, lambda: VAR(CONFIGS[0]), load_var, torch.float32, CPU)
    file = path
    if path.name.endswith(".json"):
        file = tmp_path / json.loads(path.read_text())["weight_map"][key]
    assert one_line(caught).startswith(f"{file}: {key} holds NaN at 1 of ")
    del state[key]
    path = write(state, tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: .*1 missing: {key}$"):
        read_network(path, lambda: VAR(CONFIGS[0]), load_var, torch.float32, CPU)


@pytest.fixture
def folder(toy_folder: Path, tmp_path: Path) -> Path:
    """A copy of the toy, to spoil."""
    return Path(shutil.copytree(toy_folder, tmp_path / "toy"))


@pytest.mark.parametrize("stem", ["transformer", "autoencoder"])
def test_a_folder_of_ours_is_checked(folder: Path, stem: str) -> None:
    path = folder / f"{stem}.safetensors"
    state = load_file(path)
    key = sorted(state)[0]
    save_file(spoilt(state, key, 1e6), path)
    with pytest.raises(CheckpointError, match=rf"{stem}\.safetensors: {re.escape(key)} reaches 1e\+06, but float16"):
        Pipeline.from_pretrained(folder, dtype="float16")
    save_file(spoilt(state, key, NAN), path)
    with pytest.raises(CheckpointError) as caught:
        Pipeline.from_pretrained(folder)
    assert one_line(caught).startswith(f"{path}: {key} holds NaN at 1 of ")


def test_a_decoder_in_another_dtype_is_checked(folder: Path) -> None:
    path = folder / "autoencoder.safetensors"
    state = load_file(path)
    save_file(spoilt(state, "decoder.conv_in.bias", 7e4), path)
    Pipeline.from_pretrained(folder, decoder_dtype="bfloat16")
    said = r"autoencoder\.safetensors: decoder\.conv_in\.bias reaches 70000, but float16 .*; take --decoder-dtype bf"
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(CheckpointError, match=said):
            Pipeline.from_pretrained(folder, dtype=dtype, decoder_dtype="float16")
    save_file(spoilt(state, "encoder.conv_in.bias", 7e4), path)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.bias reaches 70000, .*; take --dtype bfloat16"):
        Pipeline.from_pretrained(folder, dtype="float16", decoder_dtype="float32")


def test_text_encoder_and_places_are_checked(folder: Path) -> None:
    replace(toy_text_encoder(), places=make_places()).save(folder)
    read_text_encoder(folder, 64, CPU, has_places=True)
    for name, key in (("text_encoder.safetensors", "embeddings.word_embeddings.weight.scale"),
                      (PLACES_NAME, "outward.bias")):  # fmt: skip
        path = folder / name
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        saved = load_file(path)
        save_file(spoilt(saved, key, NAN), path, metadata=metadata)
        with pytest.raises(CheckpointError) as caught:
            read_text_encoder(folder, 64, CPU, has_places=True)
        assert one_line(caught).startswith(f"{path}: {key.removesuffix('.scale')} holds NaN at ")
        save_file(saved, path, metadata=metadata)


@pytest.mark.parametrize(("value", "said"), [(NAN, "holds NaN"), (1e5, "reaches 100000, but float16")])
def test_nothing_is_saved_that_could_not_be_loaded(tmp_path: Path, value: float, said: str) -> None:
    broken = toy_autoencoder()
    broken.decoder.conv_in.bias.data[0] = value
    with pytest.raises(CheckpointError, match=rf"autoencoder is not written: decoder\.conv_in\.bias {said}"):
        save_folder(
            tmp_path / "new", config=TOY_SPEC.to_json(), transformer=toy_transformer(), autoencoder=broken,
            text_encoder=toy_text_encoder(), notice="n", model_card="c",
        )  # fmt: skip
    assert not (tmp_path / "new").exists()


STAND_INS = {"pointer": (POINTER, "Git LFS pointer.*`git lfs pull`"), **{
    name: (page, r"web page \(HTML or XML\).*download it again") for name, page in PAGES.items()
}}  # fmt: skip


@pytest.mark.parametrize("what", STAND_INS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin", "a.ckpt", "a.safetensors.index.json"])
def test_stand_ins_for_weights_are_named(tmp_path: Path, name: str, what: str) -> None:
    content, said = STAND_INS[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: the file is a {said}") as caught:
        read_weights(tmp_path / name)
    one_line(caught)


@pytest.mark.parametrize("what", ["pointer", "doctype"])
def test_stand_ins_in_shards_and_folders_are_named(folder: Path, tmp_path: Path, what: str) -> None:
    content, said = STAND_INS[what]
    shards(random_state(VAR(CONFIGS[0])), tmp_path)
    shard = sorted(tmp_path.glob("t-*"))[1]
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name}: the file is a {said}"):
        read_weights(tmp_path / "t")
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json"):
            continue
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path.name}: the file is a {said}"):
            Pipeline.from_pretrained(folder)
        path.write_bytes(whole)
    assert isinstance(Pipeline.from_pretrained(folder).model.text, TextEncoder)
