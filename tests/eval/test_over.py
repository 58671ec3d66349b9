"""Ranges of fields and the grids that they make."""

import pytest

from foveate.core.errors import FoveateError
from foveate.eval.over import Over, grid, read_overs, with_values
from foveate.policies.registry import load_policy


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("count=1..3", ("1", "2", "3")),
        ("count=0..4:2", ("0", "2", "4")),
        ("keep-ratio=0.1..0.7:0.2", ("0.1", "0.3", "0.5", "0.7")),
        ("keep_ratio=.25..1:.5", ("0.25", "0.75")),
        ("sats=true,false", ("true", "false")),
        ("counts=[1,2],[3,4]", ("[1,2]", "[3,4]")),
        ("fill=base, zero,base", ("base", "zero")),
    ],
)
def test_ranges_and_lists(text: str, values: tuple[str, ...]) -> None:
    assert Over.parse(text).values == values


def test_a_range_of_fractions_without_a_step_has_no_grid() -> None:
    over = Over.parse("keep_ratio=0.2..0.9")
    assert over.values == ()
    with pytest.raises(FoveateError, match=r"needs a step: keep_ratio=0\.2\.\.0\.9:STEP"):
        grid(load_policy("random-tokens"), [over])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["count"], "--over is written FIELD="),
        (["count=3..1"], "a range goes up"),
        (["count=1..3:0"], "in steps above 0"),
        (["count=0..1e9"], "take a larger step"),
        ([], "needs fields to range over"),
        (["count=1..2", "count=3"], "each once"),
    ],
)
def test_what_is_no_range(texts: list[str], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        read_overs(texts)


def test_a_grid_has_every_combination_once() -> None:
    overs = read_overs(["keep_ratio=0.5..1:0.25", "fill=base,zero"])
    found = grid(load_policy("random-tokens:key=3"), overs)
    assert [setting.policy.spec for setting in found] == [
        "random-tokens:key=3", "random-tokens:fill=zero,key=3",
        "random-tokens:keep_ratio=0.75,key=3", "random-tokens:keep_ratio=0.75,fill=zero,key=3",
        "random-tokens:keep_ratio=1.0,key=3", "random-tokens:keep_ratio=1.0,fill=zero,key=3",
    ]  # fmt: skip
    assert dict(found[-1].values) == {"keep_ratio": "1", "fill": "zero"}
    same = grid(load_policy("skip-scales"), read_overs({"count": [1, 1, 2]}))
    assert [setting.policy.spec for setting in same] == ["skip-scales", "skip-scales:count=2"]


def test_fields_of_compositions_are_named_by_their_part() -> None:
    both = load_policy("skip-scales|drop-branch")
    assert with_values(both, {"drop-branch.count": "4"}).spec == "skip-scales|drop-branch:count=4"
    with pytest.raises(
        FoveateError, match=r"several parts have count; name one of skip-scales\.count, drop-branch\.count"
    ):
        with_values(both, {"count": "4"})
    with pytest.raises(FoveateError, match="no field 'keep' in skip-scales"):
        with_values(both, {"keep": "4"})
    with pytest.raises(FoveateError, match="skip-scales: count must be an int"):
        with_values(load_policy("skip-scales"), {"count": "many"})
