"""Fields of any type: read from specs and YAML, written back, and stored in an image's file."""

import json
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.core.fields import parsed, split, typed, words, written
from foveate.core.policy import Policy
from foveate.policies import registry
from foveate.policies.full import Full
from foveate.policies.registry import PRESETS, REGISTRY, from_stored, load_policy


class Curve(StrEnum):
    STEP = "step"
    SLOW = "slow|steady, and: more"


class Level(Enum):
    LOW = 1
    HIGH = 2.5


class Side(IntEnum):
    LEFT = 1
    RIGHT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Odd(Full):
    """A plug-in's policy, with fields of every type."""

    name: ClassVar[str] = "odd"
    share: float | None = None
    count: int | None = 3
    shares: tuple[float, ...] = (0.5, 0.25)
    pair: tuple[int, str] = (1, "a")
    grid: tuple[tuple[int, int], ...] = ()
    curve: Curve = Curve.STEP
    level: Level = Level.LOW
    side: Side | None = None
    mode: Literal["on", "off", "null", 3] | None = "on"
    label: str = "plain"
    note: str | None = None
    either: int | float | str = 1
    is_wide: bool | None = None


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that brings the policy."""
    monkeypatch.setattr(registry, "plug_ins", lambda: {"odd": Odd})


TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=8)
FLOATS = st.floats(allow_nan=False)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "share": st.none() | FLOATS,
        "count": st.none() | st.integers(),
        "shares": st.lists(FLOATS, max_size=4).map(tuple),
        "pair": st.tuples(st.integers(), TEXTS),
        "grid": st.lists(st.tuples(st.integers(), st.integers()), max_size=3).map(tuple),
        "curve": st.sampled_from(Curve),
        "level": st.sampled_from(Level),
        "side": st.none() | st.sampled_from(Side),
        "mode": st.sampled_from(["on", "off", 3, None]),
        "label": TEXTS,
        "note": st.none() | TEXTS.filter(lambda text: text.lower() != "none"),
        "either": st.integers() | FLOATS.filter(lambda number: number % 1 != 0),
        "is_wide": st.sampled_from([None, True, False]),
    },
)


def same(one: Policy, other: Policy) -> bool:
    """Equal, with values of the same types."""
    return one == other and [type(value) for value in one.settings().values()] == [
        type(value) for value in other.settings().values()
    ]


@given(SETTINGS)
def test_every_value_comes_back_from_a_spec_a_file_and_metadata(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]
) -> None:
    policy, path = Odd(**settings), tmp_path_factory.getbasetemp() / "odd.yaml"
    assert same(load_policy(policy.spec), policy), policy.spec
    assert load_policy(f"{policy.spec}|skip-scales:count=2").parts_of()[0] == policy
    policy.to_yaml(path)
    assert same(load_policy(path), policy), path.read_text()
    stored = json.loads(json.dumps(policy.stored()))
    assert same(from_stored([stored]), policy), stored
    assert from_stored([stored]).fingerprint == policy.fingerprint


@pytest.mark.parametrize("name", [*REGISTRY, *PRESETS])
def test_every_registered_policy_comes_back(name: str, tmp_path: Path) -> None:
    policy = load_policy(name)
    policy.to_yaml(tmp_path / "p.yaml")
    stored = json.loads(json.dumps([part.stored() for part in policy.parts_of()]))
    for again in (load_policy(policy.spec), load_policy(tmp_path / "p.yaml"), from_stored(stored)):
        assert same(again, policy)
        assert again.fingerprint == policy.fingerprint


def test_what_people_write(tmp_path: Path) -> None:
    spec = (
        'odd:share=none,shares=[.5, 1e-3,2],pair=[7,"a,b|c"],grid=[[1,2]],level=2.5,side=2,mode=3,note="",is_wide=TRUE'
    )
    expected = Odd(
        shares=(0.5, 0.001, 2.0), pair=(7, "a,b|c"), grid=((1, 2),), level=Level.HIGH, side=Side.RIGHT, mode=3, note="",
        is_wide=True,
    )  # fmt: skip
    assert same(load_policy(spec), expected)
    path = tmp_path / "odd.yaml"
    path.write_text(
        "policy: odd\nshare: ~\nshares: [.5, 1e-3, 2]\npair: [7, 'a,b|c']\ngrid:\n- [1, 2]\nlevel: 2.5\nside: 2\n"
        "mode: 3\nnote: ''\nis_wide: yes\n"
    )
    assert same(load_policy(path), expected)
    assert Odd(shares=(0.5,), note="null").spec == 'odd:shares=[0.5],note="null"'
    assert Odd(count=None, curve=Curve.SLOW).spec == 'odd:count=null,curve="slow|steady, and: more"'


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("odd:share=much", "odd: share must be a float or null, got 'much'"),
        ("odd:shares=1", r"odd: shares must be a list \[float, ...\], got '1'"),
        ("odd:shares=[1,x]", r"odd: shares must be a list \[float, ...\], got \[1, 'x'\]"),
        ("odd:pair=[1]", r"odd: pair must be a list \[int, text\], got \[1\]"),
        ("odd:level=9", "odd: level must be 1 or 2.5, got '9'"),
        ("odd:mode=of", 'odd: mode must be on or off or "null" or 3 or null, got .of.'),
        ("odd:count=1.5", "odd: count must be an int or null, got '1.5'"),
        ("odd:is_wide=1", "odd: is_wide must be true or false or null, got '1'"),
        ("odd:shares=[1", "is not written as a list"),
        ('odd:label="a', "is not written as a list .* or a text in quotes"),
    ],
)
def test_errors_say_what_the_type_wants(spec: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message) as caught:
        load_policy(spec)
    assert "\n" not in str(caught.value)


def test_a_type_that_no_spec_can_hold_is_refused() -> None:
    with pytest.raises(FoveateError, match="a field of type dict cannot be written"):
        typed(dict, "{}")


def test_true_is_no_number_and_one_is_no_switch() -> None:
    for kind, value in ((int, True), (float, True), (bool, 1), (Literal[1], True), (str, 1), (int, 1.0)):
        with pytest.raises(ValueError, match=str(value)):
            typed(kind, value)


def test_separators_in_quotes_and_brackets_separate_nothing() -> None:
    assert split('a:b="x|\\"|y"|c:d=[1,[2|3]]|e', "|") == ['a:b="x|\\"|y"', "c:d=[1,[2|3]]", "e"]
    assert [parsed(text) for text in (" a b ", "null", '"null"', "[a, 1]")] == ["a b", None, "null", ["a", 1]]
    assert (written(("a", None, True)), words(int | None)) == ('["a",null,true]', "an int or null")
