"""Conversion to safetensors: what is written loads like the original, is described truly, and nothing is lost."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.core.errors import CheckpointError, FoveateError
from foveate.families.convert import convert
from foveate.models.checkpoint_infinity import load_autoencoder, load_transformer
from foveate.models.checkpoint_var import load_var
from foveate.models.checkpoint_vq import load_vq
from foveate.models.infinity import Infinity
from foveate.models.random_weights import fill_randomly
from foveate.models.var import VAR
from foveate.models.weight_files import read_weights
from foveate.tokenizers.autoencoder import Autoencoder
from foveate.tokenizers.vq_autoencoder import VQAutoencoder
from tests.pipeline.test_published import BSQ, TOY_INFINITY, TOY_VAR, VQ

CASES = {
    "Infinity": (lambda: Infinity(TOY_INFINITY), load_transformer, "trainer.gpt_fsdp."),
    "autoencoder": (lambda: Autoencoder(BSQ), load_autoencoder, "vae."),
    "VAR": (lambda: VAR(TOY_VAR), load_var, "trainer.var_wo_ddp."),
    "VQ": (lambda: VQAutoencoder(VQ), load_vq, ""),
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
    with pytest.raises(CheckpointError, match="of no kind that is known here"):
        convert(tmp_path / "what.pth", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "what.pth"]


def test_targets(tmp_path: Path) -> None:
    torch.save(filled("VQ", 1).state_dict(), tmp_path / "in.pth")
    with pytest.raises(FoveateError, match="must end in .safetensors"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth")
    convert(tmp_path / "in.pth", tmp_path / "out")
    with pytest.raises(FoveateError, match="exists; remove it"):
        convert(tmp_path / "in.pth", tmp_path / "out")
