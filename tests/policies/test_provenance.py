"""Where a policy file's setting comes from: read beside the fields or behind the parts, and never a setting."""

from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.core.policy import Policy
from foveate.policies.provenance import Provenance
from foveate.policies.registry import PRESETS, load_policy, provenance_of

SAID = {
    "summary": "for \u2764 and tests",
    "bound": ["psnr.mean >= 35", "ssim.mean >= 0.96"],
    "model": "toy",
    "sha256": "ab" * 32,
    "command": "foveate tune",
    "n": 256,
    "measured": {"psnr": {"mean": 35.2}},
}


@pytest.mark.parametrize("spec", ["random-tokens:keep_ratio=0.4", "random-tokens|drop-branch:count=1"])
def test_a_file_holds_the_policy_and_what_was_measured_of_it(spec: str, tmp_path: Path):
    policy, path = load_policy(spec), tmp_path / "tuned.yaml"
    policy.to_yaml(path, SAID)
    assert load_policy(path) == policy
    found = provenance_of(path)
    assert found == Provenance(
        summary=SAID["summary"], bound=("psnr.mean >= 35", "ssim.mean >= 0.96"), model="toy", sha256="ab" * 32,
        command="foveate tune", rest={"n": 256, "measured": {"psnr": {"mean": 35.2}}},
    )  # fmt: skip
    assert provenance_of(str(path)) == found
    policy.to_yaml(path)
    assert (load_policy(path), provenance_of(path)) == (policy, None)


def test_one_bound_is_a_text_and_nothing_is_required(tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text("policy: full\nprovenance: {bound: psnr.p10 >= 27}\n")
    assert provenance_of(path) == Provenance(bound=("psnr.p10 >= 27",))
    path.write_text("policy: full\nprovenance: {bound: null, model: null}\n")
    assert provenance_of(path) == Provenance()


def test_it_holds_for_the_weights_that_it_names():
    named = Provenance(model="toy", sha256="a")
    assert [named.is_of(*model) for model in (("toy", "a"), ("toy", "b"), ("other", "a"))] == [True, False, False]
    assert Provenance(model="toy").is_of("toy", "b")
    assert not Provenance(model="toy").is_of("other", "b")
    assert Provenance().is_of("other", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: full\nprovenance: 3\n", "provenance must be one mapping"),
        ("- policy: full\n- provenance: {}\n- provenance: {}\n", "provenance must be one mapping"),
        ("provenance: {}\n", "needs a mapping with the key policy"),
        ("policy: full\nprovenance: {model: 3}\n", "provenance: model must be a text or null, got 3"),
        ("policy: full\nprovenance: {bound: [3]}\n", "provenance: bound must be a text or null, got 3"),
        ("policy: full\nprovenance: {bound: 35}\n", "provenance: bound must be a text or null, got 35"),
        ("policy: full\nprovenance: {bound: {psnr.mean: 35}}\n", "provenance: bound must be a text or null, got {"),
        ("policy: full\nprovenance: {bound: [null]}\n", "provenance: bound must be a text or null, got None"),
    ],
)
def test_broken_ones_are_named(text: str, message: str, tmp_path: Path):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(FoveateError, match=message):
        load_policy(path)


def test_presets_say_what_they_are_for_and_where_they_hold():
    for name in PRESETS:
        found = provenance_of(name)
        assert found is not None
        assert found.summary
        assert provenance_of(name.replace("-", "_")) == found
        # A bound is a claim about one model, and comes with the command that measured it.
        assert not found.bound or (found.model and found.sha256 and found.command)
    assert provenance_of("preset-draft:softness=0.5") is None
    assert provenance_of("preset-draft|kv-eviction") is None
    assert provenance_of(load_policy("preset-draft")) is None
    assert provenance_of("ld-pruning") is None


def test_a_preset_of_several_parts_takes_no_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy: Policy = load_policy("random-tokens|drop-branch:count=1")
    policy.to_yaml(tmp_path / "mine.yaml", SAID)
    monkeypatch.setitem(PRESETS, "mine", tmp_path / "mine.yaml")
    assert load_policy("mine") == policy
    assert load_policy("mine|kv-eviction").parts_of() == (*policy.parts_of(), load_policy("kv-eviction"))
    message = r"^mine has several parts; to change one, write it out: random-tokens\|drop-branch:count=1$"
    with pytest.raises(FoveateError, match=message):
        load_policy("mine:keep_ratio=0.3")
