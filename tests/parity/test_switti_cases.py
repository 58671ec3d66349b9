"""Every recorded Switti case through the runner; changed requests and records have to fail."""

import json
from pathlib import Path

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"


def run_changed(folder: Path, name: str, change: dict[str, object], record: dict[str, torch.Tensor] | None = None):
    case = json.loads((DATA / f"{name}.json").read_text())
    (folder / "case.json").write_text(json.dumps(case | change))
    save_file(record or load_file(DATA / f"{name}.safetensors"), folder / "case.safetensors")
    return parity.run_case(folder / "case.json")


@pytest.mark.parametrize("name", ["window", "ar"])
def test_reproduces_reference(name: str):
    result = parity.run_case(DATA / f"switti_{name}.json")
    assert result.status == "pass", result
    assert result.max_logit_error <= 1e-4
    assert result.codes_equal
    assert result.latent_error <= 1e-4
    assert result.image_error <= 5e-3


@pytest.mark.parametrize(
    "change",
    [
        {"cfg": 6.1},
        {"turn_off_cfg_start_si": 5},
        {"turn_on_cfg_start_si": 2},
        {"last_scale_temp": None},
        {"transformer_seed": 13},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_request_fails(tmp_path: Path, change: dict[str, object]):
    result = run_changed(tmp_path, "switti_window", change)
    assert result.status == "fail"
    assert "max_logit_error" in result.reason


def test_hidden_text_matters_only_if_it_is_shown(tmp_path: Path):
    """What the mask hides never reaches the logits; showing it does."""
    record = load_file(DATA / "switti_window.safetensors")
    assert not record["context_mask"].all()
    hidden = record["context_mask"] == 0
    other = record | {"context": torch.where(hidden[..., None], torch.ones(()), record["context"])}
    assert run_changed(tmp_path, "switti_window", {}, other).status == "pass"
    shown = record | {"context_mask": torch.ones_like(record["context_mask"])}
    assert "max_logit_error" in run_changed(tmp_path, "switti_window", {}, shown).reason


def test_the_variants_are_told_apart(tmp_path: Path):
    model = json.loads((DATA / "switti_ar.json").read_text())["model"]
    result = run_changed(tmp_path, "switti_ar", {"model": model | {"use_ar": False}})
    assert "max_logit_error" in result.reason


def test_another_seed_fails(tmp_path: Path):
    result = run_changed(tmp_path, "switti_ar", {"seed": 4})
    assert result.status == "fail"
    assert result.max_logit_error <= 1e-4
    assert not result.codes_equal
