"""Every recorded case through the runner, each once; and the runner itself, which has to be able to fail."""

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
from foveate.engine.sample import Filter, KeyedSampler, ReferenceSampler
from foveate.models.infinity import Infinity, InfinityConfig
from foveate.policies.fastvar import FastVAR
from tests.toys import toy

DATA = Path(__file__).parent / "data"
CASES = ("argmax", "batch2", "cfg_at_layer", "patchify", "sampled_wide")
CONTINUING = ("argmax", "patchify", "wide_batch2")
FASTVAR = {
    "fastvar_infinity": FastVAR(),
    "fastvar_infinity_tall": FastVAR(),
    "fastvar_infinity_published_wide": FastVAR(match="width"),
}
"""The policy that each case names by its widths."""
QUICK = ("fastvar_infinity", "fastvar_infinity_tall")
"""That of the published widths waits for `make soak`."""
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
    assert result.image_error is None or result.image_error <= 5e-3


@pytest.mark.parametrize("name", CASES)
def test_reproduces_reference(name: str) -> None:
    result = parity.run_case(DATA / f"infinity_{name}.json")
    assert_reproduced(result)
    assert "without fused norms" in result.reason


@pytest.mark.parametrize("name", CONTINUING)
def test_reproduces_the_published_path(name: str) -> None:
    result = parity.run_case(DATA / f"infinity_continuing_{name}.json")
    assert_reproduced(result)
    assert result.image_error is not None
    assert "continue over the scales" in result.reason


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.soak) for n in FASTVAR if n not in QUICK)]
)
def test_reproduces_fastvar(name: str) -> None:
    """The older case is judged before its first cut that is not clear, or in full if that cut fell as recorded."""
    result = parity.run_case(DATA / f"{name}.json")
    assert_reproduced(result)
    assert f"continue over the scales; {FASTVAR[name].spec}" in result.reason
    assert ("a cut among tokens of" in result.reason) == (name == "fastvar_infinity")


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
    infinity = {f"infinity_{name}" for name in CASES} | {f"infinity_continuing_{name}" for name in CONTINUING}
    assert infinity | {f"var_{name}" for name in VAR_CASES} | set(FASTVAR) <= found
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


def test_a_case_is_tried_on_the_path_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def note(name: str, case: object, record: object, *, restarts_positions: bool) -> parity_common.Result:
        tried.append(restarts_positions)
        return parity_common.Result(case=name, status="pass", max_logit_error=0.0)

    monkeypatch.setattr(parity_infinity, "run_on_path", note)
    fastvar, _ = read_case("fastvar_infinity")
    assert "rotary_positions" not in fastvar
    for case in (read_case("infinity_continuing_argmax")[0], fastvar, read_case("infinity_argmax")[0]):
        parity_infinity.run("case", case, {})
    assert tried == [False, False, False, True]


# FastVAR's settings


def test_another_reference_scale_fails(tmp_path: Path) -> None:
    case, record = read_case("fastvar_infinity_tall")
    other = {**case, "policy": {**case["policy"], "cache": [30, 15]}}
    result = parity.run_case(write_case(tmp_path, "tall", other, record))
    assert result.status == "fail"
    assert "max_logit_error" in result.reason


@pytest.mark.parametrize("name", list(FASTVAR))
def test_widths_become_a_policy(name: str) -> None:
    case, _ = read_case(name)
    schedule = parity_infinity.build_schedule(case)
    assert parity_common.policy_by_widths(case, schedule) == FASTVAR[name]
    if name == "fastvar_infinity":
        other = {"cache": [20, 20], "layers": [2, 5], "prune": {"32": 0.25, "40": 0.75}}
        changed = {**case, "policy": {**case["policy"], **other}}
        assert parity_common.policy_by_widths(changed, schedule) == FastVAR(
            keep_first=0.75, keep_second=0.25, reference_scale=-6, first_block=2, last_block=5
        )


@pytest.mark.parametrize(
    "change", [{"name": "sparsevar"}, {"skipped_widths": [64]}, {"cache": [20, 21]}, {"prune": {"32": 0.4}}]
)
def test_other_policies_are_not_supported(tmp_path: Path, change: dict[str, object]) -> None:
    case, record = read_case("fastvar_infinity")
    result = parity.run_case(write_case(tmp_path, "case", {**case, "policy": {**case["policy"], **change}}, record))
    assert result.status == "unsupported"


def test_scales_that_the_record_lacks_are_named(tmp_path: Path) -> None:
    case, record = read_case("fastvar_infinity")
    del record["step10.logits"]
    result = parity.run_case(write_case(tmp_path, "case", case, record))
    assert result.status == "fail"
    assert "11 scales run, but 10 were recorded" in result.reason


# How a run is judged


def forced_and_recorded(cuts: dict[int, float]) -> tuple[parity_common.Forced, dict[str, torch.Tensor]]:
    """A run of scales 0, 1 and 3, and a record that equals it."""
    logits = [torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    steps = [parity_common.Step(scale=s, logits_BldV=x, is_agreed=True) for s, x in zip((0, 1, 3), logits, strict=True)]
    latent = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    record = {f"step{i:02d}.logits": x[:, 1:].clone() for i, x in enumerate(logits)}
    record |= {f"step{i:02d}.positions": torch.arange(1, 4) for i in range(3)} | {"latent": latent.clone()}
    return parity_common.Forced(steps=tuple(steps), latent_BZHW=latent, pixels_B3YX=None, cuts=cuts), record


def test_all_steps_are_judged_where_cuts_are_clear() -> None:
    run, record = forced_and_recorded({3: 2e-5})
    assert parity_common.judge("case", run, record) == parity_common.Result(
        case="case", status="pass", max_logit_error=0.0, codes_equal=True, latent_error=0.0
    )
    record["step02.logits"][0, 0, 0, 0] += 1
    assert parity_common.judge("case", run, record).status == "fail"


def test_behind_a_cut_that_is_not_clear_a_difference_is_forgiven_and_said() -> None:
    run, record = forced_and_recorded({1: 2e-5, 3: 9e-6})
    cut = "a cut among tokens of 9.0e-06 at scale 3"
    assert parity_common.judge("case", run, record).reason == f"{cut} fell as recorded"
    record["step02.logits"][0, 0, 0, 0] += 1
    wrong = replace(run, steps=(*run.steps[:2], replace(run.steps[2], is_agreed=False)))
    result = parity_common.judge("case", wrong, record)
    assert (result.status, result.max_logit_error, result.codes_equal) == ("pass", 0.0, True)
    assert result.reason == f"judged before scale 3: {cut}"


def test_a_cut_that_was_recorded_as_clear_forgives_nothing() -> None:
    run, record = forced_and_recorded({3: 9e-6})
    assert parity_common.judge("case", run, record, 1.1e-5).reason == ""
    record["step02.logits"][0, 0, 0, 0] += 1
    assert parity_common.judge("case", run, record, 1.1e-5).status == "fail"
    for recorded_cut in (None, 9e-6):
        assert parity_common.judge("case", run, record, recorded_cut).status == "pass"


@pytest.mark.parametrize(
    ("name", "off", "status"),
    [
        ("decoded", 5e-5, "pass"),
        ("decoded", 2e-4, "fail"),
        ("decoded_f16", 2e-3, "pass"),
        ("decoded_f16", 1e-2, "fail"),
        ("image01", 5e-5, "pass"),
        ("image01", 2e-4, "fail"),
        ("image01_f16", 2e-3, "pass"),
        ("image01_f16", 1e-2, "fail"),
    ],
)
def test_images_are_bound_by_the_dtype_they_were_recorded_in(name: str, off: float, status: str) -> None:
    """Relative to the standard deviation of the recorded image."""
    run, record = forced_and_recorded({})
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)) / 4
    recorded = (pixels + 1) / 2 if name.startswith("image01") else pixels
    record[name] = recorded.half() if name.endswith("f16") else recorded
    found = parity_common.recorded_pixels(record)
    shift = torch.zeros(1, 3, 8, 8).index_fill(3, torch.tensor([2]), off * float(found.float().std(correction=0)))
    result = parity_common.judge("case", replace(run, pixels_B3YX=found.float() + shift), record)
    assert result.status == status
    assert result.image_error == pytest.approx(off, rel=2e-2)
    assert ("image_error" in result.reason) == (status == "fail")


@pytest.mark.parametrize("key", ["step00.logits", "step01.logits", "latent"])
def test_before_that_cut_nothing_is_forgiven(key: str) -> None:
    run, record = forced_and_recorded({3: 1e-9})
    record[key].view(-1)[0] += 1
    result = parity_common.judge("case", run, record)
    assert result.status == "fail"
    assert ("latent_error" if key == "latent" else "max_logit_error") in result.reason
    run, record = forced_and_recorded({3: 1e-9})
    odd = replace(run, steps=(replace(run.steps[0], is_agreed=False), *run.steps[1:]))
    assert parity_common.judge("case", odd, record).status == "fail"


def test_cuts_are_measured_where_tokens_are_left_out() -> None:
    schedule = ScaleSchedule.from_template(1.0, "0.06M")
    bound = parity_common.WatchedBound(FastVAR(first_block=0).bind(schedule, toy("square").model.shape))
    (part,) = bound.plan(3, None, None)[0].sublayers
    x_RlC = torch.arange(36.0).square()[None, :, None]
    score = part.scorer(x_RlC)[0]
    order = score.sort(descending=True).values
    expected = (order[21] - order[22]) / score.std(correction=0)
    assert bound.cuts == {3: pytest.approx(float(expected))}
    part.scorer(x_RlC[:, :20])
    assert bound.cuts == {3: pytest.approx(float(expected))}
    assert bound.plan(2, None, None)[0].sublayers == ()
    assert bound.keeps(2) == bound.inner.keeps(2) != frozenset()


def agrees(logits: torch.Tensor, recorded: torch.Tensor, top_p: float = 0.0, seed: int | None = None) -> bool:
    """Whether a choice from these logits (B, l, d, V) counts as the recorded one; greedy without a seed."""
    inner = KeyedSampler(seeds=(0,)) if seed is None else ReferenceSampler(generator=generator(seed))
    sampler = parity_common.ForcingSampler(inner=inner, recorded={0: recorded})
    rule = Filter(top_k=1 if seed is None else 0, top_p=top_p)
    answer = sampler.choose(0, (1, logits.shape[1]), list(logits), None, rule)
    assert torch.equal(torch.stack(answer), recorded)
    if seed is not None:
        once = generator(seed)
        torch.empty(logits.numel()).exponential_(generator=once)
        assert torch.equal(inner.generator.get_state(), once.get_state())
    return sampler.steps[0].is_agreed


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_ties_are_judged_by_the_two_logits_that_differ() -> None:
    logits = torch.tensor([[[[0.0, 1e-6], [1.0, -1.0]]]])
    assert agrees(logits, torch.tensor([[[1, 0]]]))
    assert agrees(logits, torch.tensor([[[0, 0]]]))
    assert not agrees(logits, torch.tensor([[[0, 1]]]))
    ids = torch.tensor([[[[5.0, 1.0, 5.000001, -3.0]]]])
    assert agrees(ids, torch.tensor([[[0]]]))
    assert not agrees(ids, torch.tensor([[[1]]]))
    assert not agrees(torch.tensor([[[[5.0, 1.0, 5.001, -3.0]]]]), torch.tensor([[[0]]]))


@pytest.mark.parametrize(("gap", "is_near"), [(2e-5, True), (2e-3, False)])
def test_sampled_ties_are_judged_by_the_race(gap: float, is_near: bool) -> None:
    """In the race p / e two values are level where their logits differ as the logarithms of their draws do."""
    draws = torch.empty(3, 2).exponential_(generator=generator(4))
    logits = draws.log()
    logits[:, 1] += torch.tensor([gap, 3.0, -3.0])
    for recorded, expected in (([1, 1, 0], True), ([0, 1, 0], is_near), ([0, 0, 0], False)):
        assert agrees(logits[None, :, None], torch.tensor(recorded)[None, :, None], seed=4) == expected


@pytest.mark.parametrize(("distance", "is_near"), [(1e-5, True), (1e-3, False)])
def test_sampled_ties_are_judged_by_the_threshold_of_top_p(distance: float, is_near: bool) -> None:
    """A value just below the threshold never wins; the reference may have had it just above."""
    draws = torch.empty(400, 2).exponential_(generator=generator(4))
    wins = int((draws[:, 1] / draws[:, 0]).argmax())
    assert draws[wins, 1] / draws[wins, 0] > 99
    logits = torch.zeros(400, 2)
    logits[:, 1] = 3.0
    logits[wins, 1] = torch.tensor(0.97 / 0.03).log() + distance
    free = ReferenceSampler(generator=generator(4)).choose(
        0, (1, 400), [logits[:, None]], None, Filter(top_k=0, top_p=0.97)
    )
    recorded = free[0][None].clone()
    assert recorded[0, wins, 0] == 1
    assert agrees(logits[None, :, None], recorded, top_p=0.97, seed=4)
    recorded[0, wins, 0] = 0
    assert agrees(logits[None, :, None], recorded, top_p=0.97, seed=4) == is_near


def test_lines_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 2
    capsys.readouterr()
    (tmp_path / "a.json").write_text(json.dumps({"family": "star"}))
    (tmp_path / "b.json").write_text(json.dumps({"family": "var", "policy": {"name": "fastvar"}}))
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
