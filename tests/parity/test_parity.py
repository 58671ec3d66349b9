"""Every recorded Infinity case through the runner; and the runner itself, which has to be able to fail."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.core.schedule import ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig

DATA = Path(__file__).parent / "data"
CASES = ("argmax", "batch2", "cfg_at_layer", "patchify", "sampled_wide")


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", Path(__file__).parents[2] / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module
    spec.loader.exec_module(module)
    return module


parity = load_runner()


def write_case(folder: Path, name: str, case: dict[str, object], record: dict[str, torch.Tensor]) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(case))
    save_file(record, folder / f"{name}.safetensors")
    return folder / f"{name}.json"


def read_case(name: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    return json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_reproduces_reference(name: str) -> None:
    result = parity.run_case(DATA / f"infinity_{name}.json")
    assert result.status == "pass", result
    assert result.max_logit_error <= 1e-4
    assert result.codes_equal
    assert result.latent_error <= 1e-4
    assert result.image_error <= 5e-3
    assert "without fused norms" in result.reason


def test_the_paths_of_the_reference_are_told_apart() -> None:
    result = parity.run_infinity("argmax", *read_case("infinity_argmax"), restarts_positions=False)
    assert result.status == "fail"
    assert result.max_logit_error > 1e-2
    assert result.latent_error <= 1e-4


def test_restarted_positions_are_those_of_the_first_tokens() -> None:
    config = InfinityConfig(depth=1, width=16, heads=2, bits=4, text_width=8, pool_heads=2, text_tokens=4, ff_width=8)
    schedule = ScaleSchedule.from_template(1.0, "0.06M")
    sequence = torch.cat([Infinity(config).positions(schedule, s) for s in range(7)])
    restarting = Infinity(replace(config, restarts_positions=True))
    for scale in (0, 1, 3, 6):
        tokens = schedule.scales[scale].num_tokens
        assert torch.equal(restarting.positions(schedule, scale), sequence[:tokens])


def test_all_cases_are_here() -> None:
    assert sorted(p.stem for p in DATA.glob("*.json")) == [f"infinity_{name}" for name in CASES]


def test_a_wrong_record_fails(tmp_path: Path) -> None:
    case, record = read_case("infinity_argmax")
    record["step03.logits"][0, 0, 0, 0] += 0.1
    record["latent"][0, 0, 0, 0] += 0.1
    result = parity.run_case(write_case(tmp_path, "infinity_argmax", case, record))
    assert result.status == "fail"
    assert "max_logit_error" in result.reason
    assert "latent_error" in result.reason
    assert result.codes_equal


def test_other_codes_fail(tmp_path: Path) -> None:
    case, record = read_case("infinity_argmax")
    record["step06.bits"][0, 0, 0, 0, 0] ^= 1
    result = parity.run_case(write_case(tmp_path, "infinity_argmax", case, record))
    assert result.status == "fail"
    assert not result.codes_equal


def test_another_seed_fails(tmp_path: Path) -> None:
    case, record = read_case("infinity_sampled_wide")
    result = parity.run_case(write_case(tmp_path, "wide", {**case, "g_seed": 12}, record))
    assert result.status == "fail"
    assert result.max_logit_error <= 1e-4
    assert not result.codes_equal


def test_lists_per_scale_equal_numbers(tmp_path: Path) -> None:
    case, record = read_case("infinity_batch2")
    lists = {key: [case[key]] * 7 for key in ("cfg", "tau")}
    result = parity.run_case(write_case(tmp_path, "lists", {**case, **lists}, record))
    assert result.status == "pass", result


def test_ties_are_judged_by_the_gap_of_the_logits() -> None:
    logits = torch.tensor([[[[0.0, 1e-6], [1.0, -1.0]]]])
    recorded = torch.tensor([[[0, 0]]])
    assert parity.is_near_tie(torch.tensor([[[1, 0]]]), recorded, logits)
    assert not parity.is_near_tie(torch.tensor([[[0, 1]]]), recorded, logits)


def test_lines_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 2
    capsys.readouterr()
    (tmp_path / "a.json").write_text(json.dumps({"family": "switti"}))
    (tmp_path / "b.json").write_text(json.dumps({"family": "infinity", "policy": {"name": "fastvar"}}))
    assert parity.main([str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["case"], line["status"]) for line in lines] == [("a", "unsupported"), ("b", "unsupported")]
    assert "fastvar" in lines[1]["reason"]
    assert parity.main([str(tmp_path), "--strict"]) == 1
    capsys.readouterr()
    shutil.copy(DATA / "infinity_argmax.json", tmp_path / "c.json")
    assert parity.main([str(tmp_path)]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["status"] == "fail"
    assert "c.safetensors" in last["reason"]
