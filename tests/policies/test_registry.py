"""Loading policies by name, spec and file; what they print; and errors that name the closest."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.policies import registry
from foveate.policies.depthvar import DepthVAR
from foveate.policies.drop_branch import DropBranch
from foveate.policies.full import Full
from foveate.policies.ld_pruning import LDPruning
from foveate.policies.registry import PRESETS, REGISTRY, all_policies, join, load_policy
from foveate.policies.skip_scales import SkipScales


@pytest.mark.parametrize("name", list(REGISTRY))
def test_name_gives_the_defaults(name: str):
    policy = load_policy(name)
    assert policy == REGISTRY[name]()
    assert policy.spec == policy.name == name
    assert load_policy(name.replace("-", "_")) == policy
    assert load_policy(policy) is policy


def test_fields_are_read_by_their_type():
    policy = load_policy("ld_pruning: sats = FALSE, energy-share=.25 ,skip_last=1,energy_from=last_computed")
    assert policy == LDPruning(sats=False, energy_share=0.25, skip_last=1, energy_from="last_computed")
    assert policy.spec == "ld-pruning:energy_share=0.25,sats=false,skip_last=1,energy_from=last_computed"
    assert load_policy("depthvar:reference_scale=-2,rotation=round-robin") == DepthVAR(
        reference_scale=-2, rotation="round-robin"
    )


@pytest.mark.parametrize(
    "spec",
    ["ld-pruning:sats=false|skip-scales:count=2", "depthvar:curve=step|drop-branch", "full|full", "uniform_depth"],
)
def test_spec_round_trips(spec: str):
    policy = load_policy(spec)
    assert load_policy(policy.spec) == policy
    assert load_policy(policy.spec).fingerprint == policy.fingerprint


def test_parts_stay_in_order():
    policy = load_policy("ld-pruning | skip-scales:count=2 | drop-branch")
    assert policy.parts_of() == (LDPruning(), SkipScales(count=2), DropBranch())
    assert policy == LDPruning() | SkipScales(count=2) | DropBranch()
    assert (LDPruning() | (SkipScales() | Full())).parts_of() == (LDPruning(), SkipScales(), Full())
    assert join([LDPruning()]) == LDPruning()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_load_and_take_changes(name: str):
    assert load_policy(name) == load_policy(PRESETS[name])
    assert load_policy(name.replace("-", "_")) == load_policy(name)
    field = "energy_share" if name.startswith("ld-") else "softness"
    changed = load_policy(f"{name}:{field}=0.75")
    assert changed == load_policy(name).replace(**{field: 0.75}) != load_policy(name)


def test_names_of_presets_are_fixed():
    assert set(PRESETS) == {"ld-pruning-draft", "preset-faithful", "preset-balanced", "preset-draft"}
    assert load_policy("ld-pruning-draft") == LDPruning(skip_last=2)
    assert not set(PRESETS) & set(REGISTRY)
    assert sorted(path.stem for path in PRESETS["preset-draft"].parent.iterdir()) == sorted(PRESETS)


@pytest.mark.parametrize("spec", [*REGISTRY, *PRESETS, "ld-pruning:sats=false|depthvar:fill=identity"])
def test_yaml_round_trips(spec: str, tmp_path: Path):
    policy, path = load_policy(spec), tmp_path / "policy.yaml"
    policy.to_yaml(path)
    assert load_policy(path) == policy
    assert load_policy(str(path)).fingerprint == policy.fingerprint
    assert all(field in path.read_text() for part in policy.parts_of() for field in part.settings())


def test_yaml_may_leave_fields_out_and_use_underscores(tmp_path: Path):
    path = tmp_path / "policy.yml"
    path.write_text("- policy: ld_pruning\n  energy-share: 0.25\n  sats: false\n- policy: skip-scales\n")
    assert load_policy(path) == LDPruning(energy_share=0.25, sats=False) | SkipScales()


@pytest.mark.parametrize("text", ["- 1\n", "name: full\n", "a: [1\n", ""])
def test_broken_yaml_is_named(text: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(FoveateError, match=r"policy file .*broken\.yaml"):
        load_policy(path)
    with pytest.raises(FoveateError, match="cannot read policy file"):
        load_policy(tmp_path / "missing.yaml")


def test_fingerprints_change_with_every_field():
    base = LDPruning()
    changed = [
        base.replace(energy_share=0.6), base.replace(sats_threshold=0.2), base.replace(lhep=False),
        base.replace(sats=False), base.replace(lhep_scales=2), base.replace(sats_scales=2), base.replace(skip_last=1),
        base.replace(fill="zero"), base.replace(energy_from="last_computed"), base.replace(gap_norm="l2"),
        base.replace(energy_of="residual+latent"),
    ]  # fmt: skip
    prints = {policy.fingerprint for policy in (base, *changed)}
    assert len(prints) == len(base.settings()) + 1
    assert all(len(text) == 12 and int(text, 16) >= 0 for text in prints)
    assert LDPruning().fingerprint == base.fingerprint
    assert (base | SkipScales()).fingerprint != (SkipScales() | base).fingerprint
    assert len({policy().fingerprint for policy in REGISTRY.values()}) == len(REGISTRY)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ld-prunning", "no policy 'ld-prunning'; did you mean ld-pruning?"),
        ("preset-fathful", "did you mean preset-faithful?"),
        ("depth_var", "did you mean depthvar?"),
        ("", "no policy ''; there are full, fovea"),
        ("full|", "no policy ''"),
        ("ld-pruning:energy_shares=1", "no field of ld-pruning 'energy_shares'; did you mean energy_share?"),
        ("full:x=1", "no field of full 'x'"),
        ("skip-scales:2", "policy fields are written name=value, got '2'"),
        ("skip-scales:count=two", "skip-scales: count must be an int, got 'two'"),
        ("skip-scales:count=1.5", "skip-scales: count must be an int, got '1.5'"),
        ("ld-pruning:sats=yes", "ld-pruning: sats must be true or false, got yes"),
        ("ld-pruning:fill=none", "ld-pruning: fill must be base or zero, got none"),
        ("ld-pruning:energy_share=2", "energy_share must be in .0, 1., got 2.0"),
        ("ld-pruning:energy_share=nan", "energy_share must be in .0, 1., got nan"),
    ],
)
def test_errors_say_what_came_and_what_is_near(spec: str, message: str):
    with pytest.raises(FoveateError, match=message.replace("?", r"\?")):
        load_policy(spec)


def test_an_empty_join_is_refused():
    with pytest.raises(FoveateError, match="at least one part"):
        join([])


class Entry:
    """What a package index hands out for a plug-in."""

    name, value = "ours", "package:Ours"

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def load(self) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A plug-in, one that cannot be imported, and one that is no policy; the groups that were looked up."""

    class Mine(SkipScales):
        name = "mine"

    asked: list[str] = []

    def entry_points(group: str) -> list[Entry]:
        asked.append(group)
        return [Entry(Mine), Entry(ImportError("no such module")), Entry("a text"), Entry(int)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry.plug_ins.cache_clear()
    yield asked
    registry.plug_ins.cache_clear()


def test_plug_ins_are_looked_up_once_and_broken_ones_named_once(installed: list[str]):
    with pytest.warns(UserWarning, match="policy plug-in ours .package:Ours. was left out") as said:
        assert all_policies()["mine"].name == "mine"
    assert [str(warning.message).partition("left out: ")[2] for warning in said] == [
        "no such module",
        "it is not a subclass of foveate.core.policy.Policy: 'a text'",
        "it is not a subclass of foveate.core.policy.Policy: <class 'int'>",
    ]
    # Warnings are errors in tests: a second one would be raised here.
    assert load_policy("mine:count=3|mine").parts_of()[0].settings() == {"count": 3}
    assert list(all_policies()) == [*REGISTRY, "mine"]
    assert installed == ["foveate.policies"]
    all_policies().clear()
    assert "full" in all_policies()
