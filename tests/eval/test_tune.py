"""A tuning on the toy: it finds the fastest setting that holds a bound on prompts that did not choose it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from foveate.core.errors import FoveateError
from foveate.eval import measure
from foveate.eval.measure import Setup
from foveate.eval.over import Over, read_overs
from foveate.eval.study import Study, Trial, open_study
from foveate.eval.tune import Tuning, read_goal, split_prompts, tune
from foveate.eval.tune_report import TuneReport
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy, provenance_of

PROMPTS = ["a red cat", "two dogs", "the house", "a blue rocket"]


def search(pipe: Pipeline, store: Path, **options: Any) -> TuneReport:
    given = {"subject_to": "psnr.mean >= 5", "minimize": "flops_ratio", **options}
    return tune(pipe, "skip-scales", ["count=0..2"], PROMPTS, store=store, **given)


def test_the_fastest_setting_that_holds_the_bound_wins(toy_pipe: Pipeline, tmp_path: Path, calls: list[str]) -> None:
    report = search(toy_pipe, tmp_path / "s")
    ratios = {trial.policy: trial.value for trial in report.trials}
    assert sorted(trial.values["count"] for trial in report.trials) == ["0", "1", "2"]
    assert ratios["skip-scales:count=2"] < ratios["skip-scales"] < ratios["skip-scales:count=0"]
    assert report.winner is not None
    assert report.winner.spec == "skip-scales:count=2"
    assert report.held_out is not None
    assert [row.prompt for row in report.held_out.policies[0].rows] == PROMPTS[1::2]
    calls.clear()
    again = search(toy_pipe, tmp_path / "s")
    assert calls == [], "everything is in the store"
    assert again.to_json() == report.to_json()
    with pytest.raises(FoveateError, match=r"over\.count was 3 entries .*, is 2 entries"):
        tune(toy_pipe, "skip-scales", ["count=0..1"], PROMPTS, subject_to="psnr.mean >= 5", minimize="flops_ratio",
             store=tmp_path / "s")  # fmt: skip


def test_a_tight_bound_leaves_what_changes_nothing(toy_pipe: Pipeline, tmp_path: Path, calls: list[str]) -> None:
    report = search(toy_pipe, tmp_path / "s", subject_to=["psnr.p10 >= 99", "flops_ratio > 0.5"])
    assert report.winner is not None
    assert report.winner.spec == "skip-scales:count=0"
    assert [candidate.policy for candidate in report.candidates] == ["skip-scales:count=0"]
    data = yaml.safe_load(report.to_yaml(tmp_path / "t.yaml", "foveate tune ...").read_text())
    origin = data.pop("provenance")
    assert data == {"policy": "skip-scales", "count": 0}
    assert load_policy(tmp_path / "t.yaml") == report.winner
    read = provenance_of(tmp_path / "t.yaml")
    assert read is not None
    assert read.is_of("toy", toy_pipe.model.sha256)
    assert not read.is_of("toy", "another")
    assert origin["bound"] == ["psnr.p10 >= 99", "flops_ratio > 0.5"]
    assert (origin["model"], origin["n"], origin["command"]) == ("toy", 2, "foveate tune ...")
    assert origin["sha256"] == toy_pipe.model.sha256
    assert list(origin["lower_bound"]) == ["psnr.p10 >= 99"], "a ratio of FLOPs has no interval"
    assert "flops_ratio measured, not proved: 1" in report.verdict()
    assert origin["lower_bound"]["psnr.p10 >= 99"] == origin["measured"]["psnr.p10"] == 100
    assert {"machine", "date", "confidence", "summary"} <= set(origin)


def test_nothing_wins_where_held_out_prompts_disagree(
    toy_pipe: Pipeline, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.eval.tune._pessimistic", lambda *given: -1.0)
    report = search(toy_pipe, tmp_path / "s")
    assert report.winner is None
    assert len(report.candidates) == 3
    assert report.verdict().startswith("no setting holds psnr.mean >= 5 on held-out prompts with 98.3% confidence")
    with pytest.raises(FoveateError, match="no setting holds"):
        report.yaml()
    assert "no setting holds" in report.page()
    none = search(toy_pipe, tmp_path / "t", subject_to="psnr.mean > 100")
    assert (none.winner, none.held_out, none.candidates) == (None, None, ())
    assert none.verdict().startswith("none of 3 trials holds psnr.mean > 100 on the tuning prompts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject_to": []}, "tune needs a bound"),
        ({"subject_to": "skip-scales psnr.mean > 1"}, "leave out the policy"),
        ({"subject_to": "psnr.mean == 1"}, "is an inequality"),
        ({"subject_to": "beats_controls_by_db > 1"}, "trials run without controls"),
        ({"subject_to": "psnr.min > 1"}, r"no sample bounds the worst image; bound psnr\.p10"),
        ({"subject_to": "flip.max < 1"}, r"bound flip\.p90"),
        ({"subject_to": "psnr.mean.low > 1"}, r"an interval decides anyway; bound psnr\.mean itself"),
        ({"minimize": "beauty"}, "no figure 'beauty'"),
        ({"maximize": "psnr.mean"}, "one figure to minimize or to maximize"),
        ({"trials": 0}, "trials must be 1 or more"),
        ({"held_out": ["a red cat", "the cat"]}, "1 prompts are in both sets, such as 'a red cat'"),
        ({"held_out": ["the cat"]}, "two held-out prompts or more"),
    ],
)
def test_what_cannot_be_tuned(toy_pipe: Pipeline, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        search(toy_pipe, tmp_path / "s", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_cannot_be_measured_ends_the_tuning(
    toy_pipe: Pipeline, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that fails is no fault of the setting, which the next run tries again."""

    def fail(*given: object) -> None:
        raise FoveateError("the judge gave nan")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "score_pairs", fail)
        with pytest.raises(FoveateError, match="the judge gave nan"):
            search(toy_pipe, tmp_path / "s")
    report = search(toy_pipe, tmp_path / "s")
    assert [trial.refusal for trial in report.trials] == [None] * 3
    with pytest.raises(FoveateError, match="held-out was measured with other settings"):
        search(toy_pipe, tmp_path / "s", held_out=["the cat", "the dog"])
    narrow = tune(toy_pipe, "skip-scales", ["count=1,40"], PROMPTS, subject_to="psnr.mean >= 5",
                  minimize="flops_ratio", store=tmp_path / "t")  # fmt: skip
    assert [trial.refusal is not None for trial in narrow.trials] == [False, True]


@pytest.mark.parametrize("count", [2 + 3, (2 + 3 + 2) + 2 + 3], ids=["tuning", "held-out"])
def test_ctrl_c_ends_a_tuning_though_every_prompt_was_timed_once(
    toy_pipe: Pipeline, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # Two sides warm up; the first round has three calls, as another seed runs once, and the second one two.
    real, made = measure._Runner.generate, []

    def generate(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == count + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure._Runner, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        tune(toy_pipe, "skip-scales", ["count=1"], PROMPTS[:2], subject_to="psnr.mean >= 5", minimize="flops_ratio",
             held_out=PROMPTS[2:], store=tmp_path / "s", runs=2, batch_size=2)  # fmt: skip


def test_prompts_are_split_without_repeats() -> None:
    assert split_prompts(["a", "b", "a", "c"], None) == (["a", "c"], ["b"])
    assert split_prompts(["a", "b", "a"], ["d", "d"]) == (["a", "b"], ["d"])


class Parabola:
    """Trials of a function whose best value breaks a bound: the least x^2 with x of at least 0.4."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[float] = []
        self.fails_at = fails_at

    def __call__(self, values: Mapping[str, str]) -> Trial:
        x = float(values["x"])
        self.seen.append(x)
        if len(self.seen) - 1 == self.fails_at:
            raise KeyboardInterrupt
        return Trial(
            values=values, policy=f"p{x}", value=x * x, violations={"x >= 0.4": 0.4 - x}, refusal=None, figures={}
        )


def opened(path: Path, trials: int) -> Study:
    return open_study(path, [Over.parse("x=0.0..1.5")], trials, is_maximised=False)


def test_a_search_nears_the_edge_of_what_is_allowed(tmp_path: Path) -> None:
    study, parabola = opened(tmp_path / "j", 25), Parabola()
    while study.done < study.wanted:
        study.step(parabola)
    feasible = [trial.value for trial in study.trials() if trial.is_feasible]
    assert 0.16 <= min(feasible) < 0.25
    assert sum(0.3 < x < 0.7 for x in parabola.seen[15:]) >= 5, "later trials crowd at the edge"


def test_a_search_goes_on_in_its_file_with_the_setting_that_was_cut_off(tmp_path: Path) -> None:
    first = Parabola(fails_at=2)
    study = opened(tmp_path / "j", 4)
    study.step(first)
    study.step(first)
    with pytest.raises(KeyboardInterrupt):
        study.step(first)
    again, second = opened(tmp_path / "j", 4), Parabola()
    assert again.done == 2
    while again.done < again.wanted:
        again.step(second)
    assert second.seen[0] == first.seen[2]
    assert len(second.seen) == 2
    assert len(set(second.seen + first.seen)) == 4


def test_a_list_is_another_search_than_a_range_of_the_same_ends() -> None:
    def config(over: str) -> dict[str, Any]:
        setup = Setup(prompts=("a",), seeds=1, first_seed=0, against=load_policy("full"), runs=1, batch_size=1,
                      options={})  # fmt: skip
        goal = read_goal(None, None, ["psnr.mean > 1"])
        return Tuning(base=load_policy("fovea"), overs=read_overs([over]), goal=goal, tuning=setup,
                      held_out=replace(setup, prompts=("b", "c")), trials=1).config()  # fmt: skip

    assert config("x=0.1..0.9") != config("x=0.1,0.9")
    assert config("x=1..2") != config("x=1,2")


def test_small_spaces_are_searched_whole(tmp_path: Path) -> None:
    overs = [Over.parse("x=1..3"), Over.parse("y=a,b")]
    study = open_study(tmp_path / "j", overs, 20, is_maximised=False)
    assert study.wanted == 6
    parabola = Parabola()
    seen = set()
    while study.done < study.wanted:
        seen.add(tuple(study.step(parabola).values.values()))
    assert len(seen) == 6


def test_a_setting_that_is_refused_is_a_trial_without_a_value(tmp_path: Path) -> None:
    study = opened(tmp_path / "j", 2)
    study.step(
        lambda values: Trial(values=values, policy="", value=None, violations={}, refusal="too many", figures={})
    )
    assert (study.done, study.trials()[0].is_feasible) == (1, False)
