"""Every recorded HART case through the runner; changed requests and records have to fail."""

import json
from pathlib import Path

import parity
import parity_common
import parity_hart
import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def read_case(name: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    return json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")


def run_changed(name: str, change: dict[str, object], record_change: dict[str, torch.Tensor]):
    """Without the image, which takes most of the time."""
    case, record = read_case(name)
    del record["image01_f16"]
    return parity_hart.run("changed", case | change, record | record_change)


@pytest.fixture(scope="module")
def hybrid() -> parity_hart.HybridRun:
    return parity_hart.run_forced(*read_case("hart_hybrid"))


def assert_reproduced(result: parity_common.Result) -> None:
    assert result.status == "pass", result
    assert result.max_logit_error <= 1e-5
    assert result.codes_equal
    assert result.latent_error <= 1e-4
    assert result.image_error is None or result.image_error <= 5e-3


@pytest.mark.parametrize("name", ["hart_argmax", "hart_sampled"])
def test_reproduces_reference(name: str):
    assert_reproduced(parity.run_case(DATA / f"{name}.json"))


def test_reproduces_fastvar():
    result = parity.run_case(DATA / "fastvar_hart.json")
    assert_reproduced(result)
    assert "keep_first=0.5,keep_second=0.25,skip_last=0,reference_scale=-3,first_block=0" in result.reason


def test_reproduces_the_hybrid(hybrid: parity_hart.HybridRun):
    result = hybrid.judged("hart_hybrid", *read_case("hart_hybrid"))
    assert_reproduced(result)
    assert "condition to" in result.reason
    assert "residual to" in result.reason


@pytest.mark.parametrize("key", ["diffusion.residual", "diffusion.condition", "step03.logits", "latent"])
def test_the_hybrid_is_held_to_all_that_was_recorded(hybrid: parity_hart.HybridRun, key: str):
    case, record = read_case("hart_hybrid")
    record[key] = record[key].roll(1, 1)
    result = hybrid.judged("hart_hybrid", case, record)
    assert result.status == "fail"
    assert {"step03.logits": "max_logit_error"}.get(key, key.removeprefix("diffusion.")) in result.reason


def test_another_seed_mixes_other_codes():
    result = run_changed("hart_hybrid", {"g_seed": 23}, {})
    assert result.status == "fail"
    assert result.max_logit_error <= 1e-5
    assert not result.codes_equal


def test_another_guidance_fails():
    assert "max_logit_error" in run_changed("hart_argmax", {"cfg": 4.6}, {}).reason


def test_positions_and_padding_decide():
    """Padding is not masked: what it holds reaches the logits, and so do its positions."""
    _, record = read_case("hart_argmax")
    padding = record["context_mask"] == 0
    assert padding.any()
    for change in (
        {"context": torch.where(padding[..., None], 0.5, record["context"])},
        {"context_position_ids": record["context_position_ids"] + 1},
    ):
        assert "max_logit_error" in run_changed("hart_argmax", {}, change).reason


def test_a_left_padded_text_is_read_by_its_recorded_positions():
    """Positions are read as they were recorded, -1 on padding in front too, and not counted anew."""
    case, record = read_case("hart_argmax")
    left = torch.tensor([[-1] * 5 + list(range(7))], dtype=torch.int32)
    schedule = parity_hart.schedule_of(case)
    request = parity_hart.build_request(case, record | {"context_position_ids": left}, schedule)
    assert request.conditions[0].positions == (-1,) * 5 + tuple(range(7))
    model, _ = parity_hart.build_networks(case)
    prepared = model.prepare(request.conditions)
    assert prepared.places[0] == tuple(p - 6 for p in (-1,) * 5 + tuple(range(6)))
    assert prepared.copies == (1, 11)
