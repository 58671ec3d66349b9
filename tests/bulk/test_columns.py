"""What columns mean: options under all their names, and whatever else there is."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from foveate.bulk.columns import targets
from foveate.bulk.rows import Row
from foveate.bulk.sources import open_source
from foveate.core.errors import FoveateError
from foveate.pipeline.option_texts import names_of
from foveate.pipeline.options import OPTIONS
from tests.bulk.writing import all_rows, as_csv, put


def row_of(path: Path, columns: dict[str, str] | None = None) -> Row:
    """The only row of an input, which can be read."""
    (row,) = all_rows(open_source(path, columns or {}, 10)[0])
    assert isinstance(row, Row), row
    return row


def of_json(folder: Path, **cells: Any) -> Row:
    return row_of(put(folder, "p.jsonl", json.dumps({"prompt": "a", **cells})))


def of_csv(folder: Path, **cells: Any) -> Row:
    return row_of(put(folder, "p.csv", as_csv([{"prompt": "a", **cells}])))


def test_every_name_of_an_option_is_a_column() -> None:
    for option in OPTIONS.values():
        for name in (option.name, *names_of(option)):
            assert targets()[name.lstrip("-").replace("-", "_")] == (option.alias_of or option.name)
    assert {"n", "num_images", "cfg", "tau", "p", "size", "prompt", "id", "pixels", "width"} <= set(targets())


TYPED = {
    "negative_prompt": ("blurry", "blurry"),
    "n": (4, "4"),
    "seed": (7, "7"),
    "rng": ("keyed", "keyed"),
    "width": (256, " 256 "),
    "aspect_ratio": ("4:3", "4:3"),
    "pixels": ("1M", "1M"),
    "cfg": (2.5, "2.5"),
    "guidance-scale": ([1.0, 2.5, 3.0], "1,2.5,3"),
    "temperature": (1, "1"),
    "top_k": ([5, 6], "5,6.0"),
    "top_p": (0.9, "0.9"),
    "more_smooth": (True, "Yes"),
    "policy": ("skip-scales:count=2", "skip-scales:count=2"),
    "budget": (0.5, "0.5"),
}


@pytest.mark.parametrize("name", TYPED)
def test_options_have_their_types_in_json_and_in_texts(tmp_path: Path, name: str) -> None:
    value, text = TYPED[name]
    target = targets()[name.replace("-", "_")]
    assert of_json(tmp_path, **{name: value}).options == {target: value}
    assert of_csv(tmp_path, **{name: text}).options == {target: value}


def test_all_options_that_a_row_can_say_are_tested() -> None:
    known = {targets()[name.replace("-", "_")] for name in TYPED} | {"height"}
    assert known == {name for name, one in OPTIONS.items() if one.alias_of is None and not one.not_in_rows}


def test_sizes_and_whole_numbers_as_people_and_tables_write_them(tmp_path: Path) -> None:
    assert of_csv(tmp_path, size="256X192").options == {"width": 256, "height": 192}
    assert of_json(tmp_path, size="0.60m").options == {"pixels": "0.60M"}
    assert of_csv(tmp_path, seed="7.0", n="2").num_images == 2
    assert of_json(tmp_path, seed=7.0, aspect_ratio=1.333).options == {"seed": 7, "aspect_ratio": 1.333}
    row = row_of(put(tmp_path, "p.jsonl", '{"prompt": 207, "id": 9}'))
    assert (row.prompt, row.id, row.num_images) == ("207", "9", None)


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("seed", "cfg", "policy", "size", "n", "more_smooth", "source"))
    assert of_json(tmp_path, **nothing) == Row(index=0, id="0", prompt="a", options={}, extra={})
    assert of_csv(tmp_path, **dict.fromkeys(nothing, "")) == Row(index=0, id="0", prompt="a", options={}, extra={})
    path = put(tmp_path, "p.jsonl", '{"prompt": "a", "seed": NaN, "policy": NaN, "id": NaN, "x": NaN, "y": [NaN]}')
    assert row_of(path) == Row(index=0, id="0", prompt="a", options={}, extra={"y": [None]})
    assert of_csv(tmp_path, seed="nan", cfg="NaN").options == {}


def test_other_columns_are_carried_along(tmp_path: Path) -> None:
    extra = {"source": "web", "tags": ["x", {"y": None}], "score": 0.5, "empty": "", "is_good": True, "big": 2**70}
    assert of_json(tmp_path, **extra).extra == extra
    assert of_csv(tmp_path, source="web", score="0.50").extra == {"source": "web", "score": "0.50"}
    path = put(tmp_path, "p.csv", ",prompt,\n0,a,x\n")
    assert row_of(path).extra == {"column 1": "0", "column 3": "x"}


def test_columns_that_are_nearly_options_are_named_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "polcy": "full", "Seed": 1, "source": "x", "negative prompt": "b"}] * 3
    found = open_source(put(tmp_path, "p.csv", as_csv(rows)), {}, 10)[1]
    assert found.extra_columns == ("polcy", "Seed", "source", "negative prompt")
    assert found.notes == tuple(
        f"the column {column!r} sets nothing and is carried along; if you meant {meant}, rename it"
        for column, meant in (("polcy", "policy"), ("Seed", "seed"), ("negative prompt", "negative_prompt"))
    )


def test_columns_are_mapped(tmp_path: Path) -> None:
    cells = {"caption": "a cat", "prompt": "old", "scale": 3, "key": "k1", "cfg": 9}
    path = put(tmp_path, "p.jsonl", json.dumps(cells))
    row = row_of(path, {"prompt": "caption", "guidance-scale": "scale", "id": "key"})
    assert row == Row(
        index=0, id="k1", prompt="a cat", options={"guidance_scale": 3}, extra={"prompt": "old", "cfg": 9}
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "text"}, "has no column text; there are caption, seed; see --column"),
        ({}, "has no column prompt; there are caption, seed; --column prompt=NAME says which one holds the prompts"),
        ({"polcy": "seed"}, "no column 'polcy'; did you mean policy?"),
        ({"trace": "seed"}, "a row cannot say trace: a run writes images and a manifest; leave the column out"),
        ({"prompt": "caption", "id": "caption"}, "--column id=caption: caption or id is named twice"),
        ({"cfg": "caption", "guidance_scale": "seed"}, "seed or guidance_scale is named twice"),
        ({"prompt": "caption", "cfg": "none"}, "has no column none"),
    ],
)
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_columns_that_are_not_there_are_refused(
    tmp_path: Path, name: str, columns: dict[str, str], message: str
) -> None:
    path = put(tmp_path, name, "caption,seed\na,1\n" if name == "p.csv" else '{"caption": "a", "seed": 1}\n')
    with pytest.raises(FoveateError) as raised:
        open_source(path, columns, 10)
    assert message in str(raised.value)


def test_columns_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    for head, message in (
        ("prompt,x,x", "p.csv has the column 'x' twice; rename one of them"),
        ("prompt,cfg,guidance-scale", "p.csv: cfg and guidance-scale say the same; leave one out"),
        ('prompt,"a', "p.csv line 1 should name the columns: cells cannot be told apart"),
    ):
        with pytest.raises(FoveateError, match=message):
            open_source(put(tmp_path, "p.csv", f"{head}\na,1,2\n"), {}, 10)
    twice = pyarrow.table([["a"], [1], [2]], names=["prompt", "seed", "seed"])
    pyarrow.parquet.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(FoveateError, match=r"p\.parquet has the column 'seed' twice"):
        open_source(tmp_path / "p.parquet", {}, 10)


NOON = datetime.datetime(2024, 1, 2, 12, 30)
"""A time."""

ARROW: dict[str, tuple[pyarrow.Array, Any]] = {
    "seed": (pyarrow.array(np.array([7], dtype=np.int8)), 7),
    "top_k": (pyarrow.array([[1, 2]], pyarrow.large_list(pyarrow.uint16())), [1, 2]),
    "cfg": (pyarrow.array([1.5], pyarrow.float16()), 1.5),
    "more_smooth": (pyarrow.array([False]), False),
    "policy": (pyarrow.array(["full"], pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string())), "full"),
    "negative_prompt": (pyarrow.array(["b"], pyarrow.string_view()), "b"),
    "budget": (pyarrow.array([float("nan")]), None),
    "width": (pyarrow.array([None], pyarrow.null()), None),
    "time": (pyarrow.array([NOON], pyarrow.timestamp("ns", "UTC")), "2024-01-02 12:30:00.000000000Z"),
    "day": (pyarrow.array([NOON.date()]), "2024-01-02"),
    "price": (pyarrow.array([1], pyarrow.decimal128(10, 2)), "1.00"),
    "pause": (pyarrow.array([datetime.timedelta(seconds=1)], pyarrow.duration("ms")), 1000),
    "nested": (pyarrow.array([{"a": [NOON.date()], "b": float("nan")}]), {"a": ["2024-01-02"], "b": None}),
    "pairs": (pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())), [["k", 1]]),
}
"""Columns of parquet, and what a row says of them."""


def test_types_of_parquet(tmp_path: Path) -> None:
    arrays = {name: array for name, (array, _) in ARROW.items()}
    table = pyarrow.table(
        {
            **arrays,
            "prompt": pyarrow.array(["a"], pyarrow.large_string()),
            "image": pyarrow.array([{"bytes": b"x", "path": "p"}]),
            "hash": pyarrow.array([b"x"]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    source, found = open_source(tmp_path / "p.parquet", {}, 10)
    (row,) = all_rows(source)
    assert isinstance(row, Row)
    expected = {targets().get(name, name): value for name, (_, value) in ARROW.items() if value is not None}
    assert {**row.options, **row.extra} == expected
    assert set(row.options) == {"seed", "top_k", "guidance_scale", "more_smooth", "policy", "negative_prompt"}
    assert json.loads(json.dumps(row.extra, allow_nan=False)) == row.extra
    assert found.unused_columns == ("image", "hash")
    assert found.notes[-1] == "the column hash holds bytes and is left out"
    with pytest.raises(FoveateError, match=r"has no column hash \(it holds bytes\)"):
        open_source(tmp_path / "p.parquet", {"prompt": "hash"}, 10)
