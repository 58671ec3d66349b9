"""A comparison that stops and goes on: nothing is lost, nothing is measured twice, and other settings are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.eval import measure
from foveate.eval.compare import compare
from foveate.eval.judges import Judge
from foveate.eval.measure import Setup
from foveate.eval.report import ComparisonReport
from foveate.eval.store import check_store, open_store
from foveate.pipeline.pipeline import Pipeline
from foveate.policies.registry import load_policy
from foveate.viz.scale_map import ScaleMap
from tests.conftest import TOY_SPEC

PROMPTS = ["a red cat", "two dogs"]
POLICIES = ["skip-scales", "drop-branch"]


def run(pipe: Pipeline, store: Path | None, policies: list[str] = POLICIES, **options: Any) -> ComparisonReport:
    return compare(pipe, policies, PROMPTS, runs=options.pop("runs", 1), store=store, **options)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C instead of a call."""
    real, made = measure._Runner.generate, []

    def generate(*arguments: Any) -> Any:
        made.append(1)
        if len(made) > count:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure._Runner, "generate", generate)


def test_an_interrupted_run_goes_on_where_it_stopped(
    toy_pipe: Pipeline, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(toy_pipe, None)
    store = tmp_path / "s"
    with monkeypatch.context() as patch:
        # Three sides warm up, four calls are the first prompt, one more is of the second one.
        interrupt_after(patch, 3 + 4 + 1)
        part = run(toy_pipe, store)
    assert part.missing_prompts == 1
    assert [row.prompt for row in part.policies[0].rows] == PROMPTS[:1]
    there = (store / "records.jsonl").read_text().count('"call"')
    assert there == 5
    calls.clear()
    done = run(toy_pipe, store)
    assert (done.missing_prompts, done.sessions) == (0, 2)
    assert sum("reference" in key for key in calls) == 2, "it warms up, and runs beside what was cut off"
    assert done.fidelity.to_json() == whole.fidelity.to_json()
    assert done.yardstick.to_json() == whole.yardstick.to_json()
    calls.clear()
    again = run(toy_pipe, store)
    assert calls == [], "a complete store measures nothing"
    assert again.to_json() == done.to_json()


def test_a_turn_that_was_cut_before_its_reference_runs_again(
    toy_pipe: Pipeline, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", LastFirst)
        # Two sides warm up; then the policy runs.
        interrupt_after(patch, 2 + 1)
        with pytest.raises(KeyboardInterrupt):
            run(toy_pipe, store, ["skip-scales"])
    done = run(toy_pipe, store, ["skip-scales"])
    assert (done.missing_prompts, done.policies[0].timing.runs) == (0, 1)
    assert done.speedup.transformer > 0


class LastFirst:
    """The order of a turn: the last side first."""

    def __init__(self, seed: object) -> None:
        pass

    def permutation(self, count: int) -> list[int]:
        return list(reversed(range(count)))


def test_policies_and_runs_may_be_added(toy_pipe: Pipeline, tmp_path: Path, calls: list[str]) -> None:
    run(toy_pipe, tmp_path / "s", ["skip-scales"])
    calls.clear()
    more = run(toy_pipe, tmp_path / "s", ["skip-scales", "drop-branch"], runs=2)
    assert [len(result.rows) for result in more.policies] == [2, 2]
    assert [result.timing.runs for result in more.policies] == [2, 2]
    own = "|".join(calls)
    assert own.count("another-seed") == 0
    # A warm-up, one more run of two prompts.
    assert sum(key == more.policies[0].fingerprint for key in calls) == 1 + 2
    assert sum(key == more.policies[1].fingerprint for key in calls) == 1 + 4


def test_other_settings_are_refused_with_the_difference(toy_pipe: Pipeline, tmp_path: Path, calls: list[str]) -> None:
    store = tmp_path / "s"
    run(toy_pipe, store)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(FoveateError, match=r"other settings: .*generation\.top_k\S* was 7 entries .* is 7 entries \[5"):
        run(toy_pipe, store, options={"top_k": 5})
    with pytest.raises(FoveateError, match=r"first_seed was 0, is 4\. Take another store, or the same settings"):
        run(toy_pipe, store, first_seed=4)
    with pytest.raises(FoveateError, match=r'against\.spec was "full", is "drop-branch"; against\.fingerprint was '):
        run(toy_pipe, store, against="drop-branch")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_a_setting_that_one_side_lacks_is_a_difference(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", {"seeds": 1, "generation": {"model": "toy", "top_k": 5}}):
        pass
    with pytest.raises(FoveateError, match=r'generation\.model was "toy", is not set; budget was not set, is 0\.5'):
        check_store(tmp_path / "s", {"seeds": 1, "budget": 0.5, "generation": {"top_k": 5}})
    early = {"seeds": 1, "generation": {"top_k": 5}}
    check_store(tmp_path / "s", early, is_partial=True)
    with pytest.raises(FoveateError, match=r"other settings: budget was not set, is 0\.5\. Take"):
        check_store(tmp_path / "s", {**early, "budget": 0.5}, is_partial=True)


class Labels:
    """A judge that has a fingerprint."""

    name, is_error = "labels", False

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def score(self, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return np.zeros(len(images))


class OtherLabels(Labels):
    """Another class of the same name."""


def test_another_judge_of_the_same_name_is_refused(tmp_path: Path) -> None:
    def config(judge: Judge) -> dict[str, Any]:
        return Setup(
            prompts=("a",), seeds=1, first_seed=0, against=load_policy("full"), runs=1, batch_size=1, options={},
            judges=(judge,),
        ).config(TOY_SPEC)  # fmt: skip

    with open_store(tmp_path / "s", config(Labels("a"))):
        pass
    check_store(tmp_path / "s", config(Labels("a")))
    with pytest.raises(FoveateError, match=r'judged_by\.labels\.fingerprint was "a", is "b"\. Take'):
        check_store(tmp_path / "s", config(Labels("b")))
    with pytest.raises(FoveateError, match=r'judged_by\.labels\.class was "\S+:Labels", is "\S+:OtherLabels"\. Take'):
        check_store(tmp_path / "s", config(OtherLabels("a")))


def open_again(folder: Path) -> None:
    with open_store(folder, {}):
        pass


def test_two_processes_do_not_share_a_store(tmp_path: Path) -> None:
    with open_store(tmp_path / "s", {}), pytest.raises(FoveateError, match="in use by another process"):
        open_again(tmp_path / "s")
    open_again(tmp_path / "s")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(FoveateError, match="is no store; take a name that is free"):
        check_store(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FoveateError, match="cannot read"):
        check_store(tmp_path, {})


def test_a_line_that_was_cut_is_taken_off(tmp_path: Path) -> None:
    scores = {"psnr": 1.0, "foreground_psnr": 1.0, "ssim": 1.0, "ms_ssim": None, "flip": 0.0, "is_identical": False,
              "is_constant": False, "is_reference_constant": False, "judged": {"match": 0.5}}  # fmt: skip
    with open_store(tmp_path / "s", {}):
        pass
    whole = json.dumps({"scores": [scores], "side": "a", "batch": 0}) + "\n"
    (tmp_path / "s/records.jsonl").write_text(whole + whole[:20])
    with open_store(tmp_path / "s", {}) as store:
        assert list(store.scores) == [("a", 0)]
        assert store.scores[("a", 0)][0].value("match") == 0.5
    assert (tmp_path / "s/records.jsonl").read_text() == whole


def test_images_and_maps_come_back(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    depth_hw = np.array([[2, -1, 0]], np.int16)
    maps = [
        ScaleMap(scale=0, grid=(1, 3), num_blocks=4, depth_hw=depth_hw, num_guided=2),
        ScaleMap(scale=1, grid=(2, 2), num_blocks=4, depth_hw=None),
    ]
    with open_store(tmp_path / "s", {}) as store:
        store.add_image("a", 3, picture, maps)
        np.testing.assert_array_equal(store.image("a", 3), picture)
        first, second = store.maps("a", 3)
        np.testing.assert_array_equal(first.depth_hw, depth_hw)
        assert (first.caption, second.caption, second.grid) == (maps[0].caption, "did not run", (2, 2))
        assert store.maps("a", 4) == ()
        with pytest.raises(FoveateError, match="cannot read"):
            store.image("a", 4)
