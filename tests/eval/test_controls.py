"""Controls that a schedule allows, and what it means to beat one."""

import pytest
import torch

from foveate.eval.controls import CONTROLS, Contest, beats, beats_all_by, valid_controls
from foveate.policies.registry import load_policy
from tests.toys import toy


def contest(control: str, cost: float, *psnrs: float, setting: str = "") -> Contest:
    return Contest(
        control=control, setting=setting or control, cost=float(cost), psnrs=psnrs, mean_psnr=sum(psnrs) / len(psnrs)
    )


def test_a_control_is_beaten_by_its_best_setting_that_is_as_fast() -> None:
    ours = contest("fovea", 100, 34.0, 36.0)
    controls = [
        contest("skip-scales", 90, 30.0, 32.0, setting="skip-scales"),
        contest("skip-scales", 50, 20.0, 22.0, setting="skip-scales:count=2"),
        # Better, but slower: it does not count.
        contest("drop-branch", 101, 40.0, 40.0),
        # Just as fast counts.
        contest("random-tokens", 100, 33.0, 35.5),
        contest("fovea", 10, 90.0, 90.0),
    ]
    found = beats(ours, controls, 2)
    assert list(found) == ["skip-scales", "drop-branch", "random-tokens"]
    assert (found["skip-scales"].by_db, found["skip-scales"].setting) == (4.0, "skip-scales")
    assert (found["drop-branch"].by_db, found["drop-branch"].setting) == (None, None)
    assert found["random-tokens"].by_db == pytest.approx(0.75)
    assert found["random-tokens"].interval is not None
    assert (found["random-tokens"].interval.low, found["random-tokens"].interval.high) == (0.5, 1.0)
    assert beats_all_by(list(found.values())) == pytest.approx(0.75)
    slow = beats(contest("x", 1, 30.0), controls, 1)
    assert beats_all_by(list(slow.values())) is None


def test_a_better_control_is_a_negative_lead() -> None:
    found = beats(contest("x", 100, 30.0), [contest("skip-scales", 100, 33.0)], 1)
    assert found["skip-scales"].by_db == -3
    assert found["skip-scales"].interval is None, "one prompt says nothing of others"


def test_controls_are_those_that_a_schedule_allows_and_that_act() -> None:
    subject = toy("square")
    found = [policy.spec for policy in valid_controls(subject.schedule, subject.model.shape, torch.float32)]
    assert found == [load_policy(spec).spec for spec in CONTROLS]
    narrow = [policy.spec for policy in valid_controls(subject.schedule, subject.model.shape, torch.bfloat16)]
    assert set(found) - set(narrow) == {"late-bfloat16"}
    short = type(subject.schedule).from_grids(subject.schedule.grids[:3], patch=1)
    allowed = {policy.spec for policy in valid_controls(short, subject.model.shape, torch.float32)}
    assert set(found) - allowed == {"skip-scales:count=3"}
