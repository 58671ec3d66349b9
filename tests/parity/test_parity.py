"""Every recorded case through the runner; and the runner itself, which has to be able to fail."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import parity
import parity_common
import parity_infinity
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.core.schedule import ScaleSchedule
from foveate.models.infinity import Infinity, InfinityConfig

DATA = Path(__file__).parent / "data"
CASES = ("argmax", "batch2", "cfg_at_layer", "patchify", "sampled_wide")
VAR_CASES = ("argmax", "sampled", "shared_aln")


def write_case(folder: Path, name: str, case: dict[str, object], record: dict[str, torch.Tensor]) -> Path:
    (folder / f"{name}.json").write_text(json.dumps(case))
    save_file(record, folder / f"{name}.safetensors")
    return folder / f"{name}.json"


def read_case(name: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    return json.loads((DATA / f"{name}.json").read_text()), load_file(DATA / f"{name}.safetensors")


def assert_reproduced(result: parity_common.Result) -> None:
    assert result.status == "pass", result
    assert result.max_logit_error <= 1e-4
    assert result.codes_equal
    assert result.latent_error <= 1e-4
    assert result.image_error <= 5e-3


@pytest.mark.parametrize("name", CASES)
def test_reproduces_reference(name: str) -> None:
    result = parity.run_case(DATA / f"infinity_{name}.json")
    assert_reproduced(result)
    assert "without fused norms" in result.reason


@pytest.mark.parametrize("name", VAR_CASES)
def test_reproduces_var(name: str) -> None:
    assert_reproduced(parity.run_case(DATA / f"var_{name}.json"))


def test_the_paths_of_the_reference_are_told_apart() -> None:
    result = parity_infinity.run_on_path("argmax", *read_case("infinity_argmax"), restarts_positions=False)
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
    found = {p.stem for p in DATA.glob("*.json")}
    assert {f"infinity_{name}" for name in CASES} | {f"var_{name}" for name in VAR_CASES} <= found
    for path in DATA.glob("*.json"):
        assert json.loads(path.read_text())["family"] in parity.FAMILIES


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


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"cfg": 1.6}, "max_logit_error"), ({"labels": [3, 16]}, "max_logit_error"), ({"vae_seed": 7}, "latent_error")],
)
def test_another_request_for_var_fails(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    case, record = read_case("var_argmax")
    result = parity.run_case(write_case(tmp_path, "var", {**case, **change}, record))
    assert result.status == "fail"
    assert reason in result.reason


def test_another_seed_for_var_fails(tmp_path: Path) -> None:
    case, record = read_case("var_sampled")
    result = parity.run_case(write_case(tmp_path, "var", {**case, "g_seed": 43}, record))
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
    assert parity_common.is_near_tie(torch.tensor([[[1, 0]]]), recorded, logits)
    assert not parity_common.is_near_tie(torch.tensor([[[0, 1]]]), recorded, logits)


def test_ties_of_ids_are_judged_by_the_two_that_differ() -> None:
    logits = torch.tensor([[[[5.0, 1.0, 5.000001, -3.0]]]])
    recorded = torch.tensor([[[2]]])
    assert parity_common.is_near_tie(torch.tensor([[[0]]]), recorded, logits)
    assert not parity_common.is_near_tie(torch.tensor([[[1]]]), recorded, logits)


def test_lines_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 2
    capsys.readouterr()
    (tmp_path / "a.json").write_text(json.dumps({"family": "hart"}))
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
