"""Conversion to safetensors: what is written loads like the original, is described truly, and nothing is lost."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.convert import convert
from foveate.models.infinity import Infinity
from foveate.models.switti import Switti
from foveate.models.var import VAR
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.weights.files import read_weights
from foveate.weights.infinity import load_autoencoder, load_transformer
from foveate.weights.random_weights import fill_randomly
from foveate.weights.var import load_var
from foveate.weights.vq import load_vq
from tests.models.test_switti import CONFIG as SWITTI
from tests.pipeline.test_published import BSQ, TOY_INFINITY, TOY_VAR, VQ

CASES = {
    "Infinity": (lambda: Infinity(TOY_INFINITY), load_transformer, "trainer.gpt_fsdp."),
    "autoencoder": (lambda: Autoencoder(BSQ), load_autoencoder, "vae."),
    "VAR": (lambda: VAR(TOY_VAR), load_var, "trainer.var_wo_ddp."),
    "VQ": (lambda: Autoencoder(VQ), load_vq, ""),
}


def filled(kind: str, seed: int) -> nn.Module:
    module = CASES[kind][0]()
    fill_randomly(module, seed)
    return module


def nested(state: dict[str, Tensor], prefix: str) -> dict[str, object]:
    inner: dict[str, object] = dict(state)
    for name in reversed(prefix.split(".")[:-1]):
        inner = {name: inner}
    return inner


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_converted_weights_load_like_the_original(tmp_path: Path, kind: str, target: str) -> None:
    module = filled(kind, 1)
    torch.save(nested(module.state_dict() | {"lvl_1L": torch.zeros(1)} if kind == "VAR" else module.state_dict(),
                      CASES[kind][2]), tmp_path / "in.pth")  # fmt: skip
    done = convert(tmp_path / "in.pth", tmp_path / target)
    assert done.kind == kind
    assert done.num_tensors == len(module.state_dict())
    other = filled(kind, 2)
    CASES[kind][1](other, read_weights(tmp_path / target))
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_manifest_is_true(tmp_path: Path) -> None:
    torch.save(filled("VAR", 1).state_dict(), tmp_path / "in.pth")
    done = convert(tmp_path / "in.pth", tmp_path / "out.safetensors", torch.bfloat16)
    assert [path.name for path in done.files] == ["out.safetensors", "out.manifest.json"]
    manifest = json.loads(done.files[-1].read_text())
    stored = load_file(done.files[0])
    assert manifest["tensors"].keys() == stored.keys()
    for key, entry in manifest["tensors"].items():
        data = stored[key].view(torch.uint8).numpy().tobytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert (entry["dtype"], entry["shape"], entry["bytes"]) == ("bfloat16", list(stored[key].shape), len(data))
    assert done.num_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert manifest["source"]["files"] == ["in.pth"]


def test_nothing_is_written_when_weights_do_not_fit(tmp_path: Path) -> None:
    state = filled("VAR", 1).state_dict()
    del state["blocks.1.ffn.fc2.bias"]
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.ffn\.fc2\.bias"):
        convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "what.pth")
    with pytest.raises(CheckpointError, match="unknown weight kind"):
        convert(tmp_path / "what.pth", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "what.pth"]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("target", ["out.safetensors", "new/out.safetensors", "out", "new/out"])
def test_overflow_is_refused_before_anything_is_written(tmp_path: Path, kind: str, target: str) -> None:
    state = filled(kind, 1).state_dict()
    key = sorted(state)[-1]
    state[key].flatten()[0] = -1e5
    torch.save(nested(state, CASES[kind][2]), tmp_path / "in.pth")
    said = rf"in\.pth: {re.escape(key)} reaches 100000, but float16 ends at 65504; take --dtype bfloat16 or float32$"
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "in.pth", tmp_path / target, torch.float16)
    state[key].flatten()[0] = float("nan")
    torch.save(nested(state, CASES[kind][2]), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=rf"in\.pth: {re.escape(key)} holds NaN at 1 of "):
        convert(tmp_path / "in.pth", tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_what_float16_holds_is_converted_and_masks_are_left(tmp_path: Path) -> None:
    state = filled("VAR", 1).state_dict()
    state["head.bias"][:2] = torch.tensor([65504.0, -65504.0])
    mask = torch.full((1, 1, 4, 4), float("-inf")).triu(1)
    wrapped = {f"module.{key}": tensor for key, tensor in (state | {"attn_bias_for_masking": mask}).items()}
    torch.save(wrapped, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors", torch.float16)
    stored = load_file(tmp_path / "out.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], tensor.half()) for key, tensor in state.items())


@pytest.mark.parametrize("target", ["out.safetensors", "new/out"])
@pytest.mark.parametrize("fails", ["_describe", "write_text"])
def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fails: str
) -> None:
    def fail(*_args: object) -> None:
        raise KeyboardInterrupt

    torch.save(filled("VQ", 1).state_dict(), tmp_path / "in.pth")
    (tmp_path / "other.safetensors").touch()
    monkeypatch.setattr("foveate.families.convert.SHARD_BYTES", 2**18)
    monkeypatch.setattr(f"foveate.families.convert.{fails}", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "in.pth", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "other.safetensors"]


def test_the_config_of_switti_goes_along_and_overwrites_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    module = Switti(SWITTI)
    fill_randomly(module, 1)
    torch.save(module.state_dict(), tmp_path / "in" / "model.pth")
    (tmp_path / "in" / "config.json").write_text('{"use_ar": true}')
    convert(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"use_ar": true}'
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FoveateError, match=r"config\.json exists and is another than the source's"):
        convert(tmp_path / "in", tmp_path / "a.safetensors")
    assert (tmp_path / "config.json").read_text() == "{}"
    assert not list(tmp_path.glob("a.*"))


def test_targets(tmp_path: Path) -> None:
    torch.save(filled("VQ", 1).state_dict(), tmp_path / "in.pth")
    with pytest.raises(FoveateError, match="must end in .safetensors"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth")
    convert(tmp_path / "in.pth", tmp_path / "out")
    with pytest.raises(FoveateError, match="exists; remove it"):
        convert(tmp_path / "in.pth", tmp_path / "out")
