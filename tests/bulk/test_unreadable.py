"""Rows that cannot be read: each is named with its place, and its neighbours stay what they are."""

import codecs
import csv
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from foveate.bulk import byte_stream, json_list
from foveate.bulk.rows import BadRow
from foveate.bulk.sources import open_source
from foveate.core.errors import FoveateError
from tests.bulk.writing import all_rows, put


def bad_among(path: Path, between: Sequence[str] = ()) -> list[tuple[int, str, str, str]]:
    """Index, id, place and reason of every unreadable row; the others are the first, the last and those between."""
    source, found = open_source(path, {}, 10)
    rows = all_rows(source)
    assert [row.index for row in rows] == list(range(found.num_rows))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(bad) == found.num_bad
    assert not any("\n" in row.reason for row in bad)
    good = [row.prompt for row in rows if not isinstance(row, BadRow)]
    assert good == ["first", *between, "last"]
    return [(row.index, row.id, row.where, row.reason) for row in bad]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a",}', "not JSON: Expecting property name enclosed in double quotes"),
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b"{'prompt': 'a'}", "not JSON: Expecting property name"),
        (b"a cat", "not JSON: Expecting value at column 1"),
        (b'{"prompt": "a"} {"prompt": "b"}', "more than one object on the line, from column 16 on"),
        (b'["a"]', 'a row must be an object such as {"prompt": "a cat"}, got a list'),
        (b'"a"', "got a text"),
        (b"7", "got a number"),
        (b"null", "got null"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b'{"prompt": "a\\u0000"}', "prompt holds a NUL"),
        (b'{"prompt": "a\0"}', "not JSON: Invalid control character"),
        (b'{"prompt": "a\\ud83c"}', "prompt is not UTF-8 (half a surrogate pair)"),
        (b'{"prompt": "a", "x\\ud83c": 1}', "the name of a column is not UTF-8"),
        (b'{"seed": 1}', "no prompt; say what to generate"),
        (b'{"prompt": null}', "no prompt"),
        (b'{"prompt": " \\t"}', "no prompt"),
        (b"{}", "no prompt"),
        (b'{"prompt": ["a"]}', "prompt must be a text, got ['a']"),
        (b'{"prompt": true}', "prompt must be a text, got True"),
        (b'{"prompt": "a", "seed": "7"}', "seed must be a whole number, got '7'"),
        (b'{"prompt": "a", "seed": 7.5}', "seed must be a whole number, got 7.5"),
        (b'{"prompt": "a", "seed": 1e300}', "seed must be a whole number, got 1e+300"),
        (b'{"prompt": "a", "seed": true}', "seed must be a whole number, got True"),
        (b'{"prompt": "a", "seed": [1, 2]}', "seed must be a whole number, got [1, 2]"),
        (b'{"prompt": "a", "cfg": "high"}', "cfg must be a number, got 'high'"),
        (b'{"prompt": "a", "cfg": [1, null]}', "cfg must be one number, or one per scale, got [1, None]"),
        (b'{"prompt": "a", "top_k": []}', "top_k must be one number, or one per scale, got []"),
        (b'{"prompt": "a", "more_smooth": 1}', "more_smooth must be true or false, got 1"),
        (b'{"prompt": "a", "policy": 7}', "policy must be a text, got 7"),
        (b'{"prompt": "a", "size": 256}', "size must be a text, got 256"),
        (b'{"prompt": "a", "size": "256x"}', "size must be one of 0.06M, 0.25M, 0.60M, 1M, or WIDTHxHEIGHT in pixels"),
        (b'{"prompt": "a", "size": "8x8", "width": 8}', "size and width both say how large the image is"),
        (b'{"prompt": "a", "cfg": 1, "guidance-scale": 2}', "cfg and guidance-scale say the same; leave one out"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice; leave one out"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "x holds an object with the key 'y' twice"),
        (b'{"prompt": "a", "x": [-Infinity]}', "x holds -inf, which JSON cannot"),
        (b'{"prompt": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "x holds lists or objects more than 32 deep"),
        (b'{"prompt": ' + b"[" * 99_999, "not JSON: lists or objects are too deep"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)  # fmt: skip
def test_a_line_of_json_is_lost_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    data = b'{"prompt": "first"}\r\n\r\n' + line + b'\r\n{"prompt": "last", "seed": 3}'
    ((index, name, where, why),) = bad_among(put(tmp_path, "p.jsonl", data))
    assert (index, name, where) == (1, "1", "p.jsonl line 3")
    assert reason in why


def test_a_bad_row_keeps_its_id(tmp_path: Path) -> None:
    lines = '{"prompt": "first", "id": 1}\n{"seed": "x", "prompt": "a", "id": "b"}\n{"id": [], "prompt": "c"}\n'
    found = bad_among(put(tmp_path, "p.jsonl", f'{lines}{{"prompt": "last", "id": "d"}}'))
    assert [row[:2] for row in found] == [(1, "b"), (2, "2")]
    assert found[1][3] == "id must be a text or a whole number, got []"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"a,7,8", "3 cells, but 2 columns; a cell with ',' needs quotes"),
        (b"a", "1 cells, but 2 columns"),
        (b",7", "no prompt"),
        (b"a,7.5", "seed must be a whole number, got '7.5'"),
        (b"a,x", "seed must be a whole number, got 'x'"),
        (b"caf\xe9,7", "prompt is not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"a\0b,7", "prompt holds a NUL"),
        (b'"a" b,7', "cells cannot be told apart (',' expected after '\"')"),
        (b'"a,7', "cells cannot be told apart"),
    ],
)
def test_a_row_of_csv_is_lost_alone(tmp_path: Path, row: bytes, reason: str) -> None:
    data = b'prompt,seed\n"first",1\n\n' + row + b'\nb,2\n"c\nd",3\nlast,4\n'
    ((index, name, where, why),) = bad_among(put(tmp_path, "p.csv", data), ["b", "c\nd"])
    assert (index, name, where) == (1, "1", "p.csv line 4")
    assert reason in why


@pytest.fixture
def small_cells() -> Iterator[None]:
    """A csv module that takes 2,000 characters a cell."""
    before = csv.field_size_limit(2000)
    yield
    csv.field_size_limit(before)


@pytest.mark.usefixtures("small_cells")
def test_a_quote_that_is_never_closed_loses_its_line_alone(tmp_path: Path) -> None:
    rows = "".join(f"p{number},{number}\n" for number in range(400))
    path = put(tmp_path, "p.csv", f'prompt,seed\nfirst,0\n"open,1\n{rows}last,2\n')
    ((index, _, where, why),) = bad_among(path, [f"p{number}" for number in range(400)])
    assert (index, where) == (1, "p.csv line 3")
    assert "a quote inside quotes is written twice" in why


def test_lines_of_text_and_entries_of_lists(tmp_path: Path) -> None:
    text = b"first\n# caf\xe9\nna\xefve\na\0b\n\nlast"
    found = bad_among(put(tmp_path, "p.txt", text))
    assert [row[2:] for row in found] == [
        ("p.txt line 3", "prompt is not UTF-8 (byte 0xef); save the file as UTF-8"),
        ("p.txt line 4", "prompt holds a NUL; save the file as text in UTF-8"),
    ]
    entries = b'[{"prompt": "first"},\n7, {"prompt": "caf\xe9"}, {"prompt": "a\0"}, {"prompt": "last"}]'
    found = bad_among(put(tmp_path, "p.json", entries))
    assert [row[2] for row in found] == ["p.json entry 2", "p.json entry 3", "p.json entry 4"]


def test_rows_of_parquet(tmp_path: Path) -> None:
    raw = pyarrow.array([b"first", b"caf\xe9", b"c", None, b"last"]).cast(pyarrow.binary())
    prompt = pyarrow.StringArray.from_buffers(5, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    seeds = pyarrow.array([1.0, 2.0, 2.5, 4.0, None])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompt, "seed": seeds}), tmp_path / "p.parquet")
    found = bad_among(tmp_path / "p.parquet")
    assert [row[2:] for row in found] == [
        ("p.parquet row 2", "prompt is not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("p.parquet row 3", "seed must be a whole number, got 2.5"),
        ("p.parquet row 4", "no prompt; say what to generate, or leave the row out"),
    ]


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "caf\u00e9|\u7ea2|x"),
        ("p.jsonl", '{"prompt": "caf\u00e9"}|{"prompt": "\u7ea2"}|{"prompt": "x"}'),
        ("p.json", '[{"prompt": "caf\u00e9"},|{"prompt": "\u7ea2"}, {"prompt": "x"}]'),
        ("p.csv.gz", "prompt,seed|caf\u00e9,|\u7ea2,|x,"),
    ],
)
def test_editors_save_text_in_several_ways(tmp_path: Path, name: str, text: str, end: str, codec: str) -> None:
    data = text.replace("|", end).encode(codec)
    source, _ = open_source(put(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data), {}, 1)
    assert [row.prompt for row in all_rows(source)] == ["caf\u00e9", "\u7ea2", "x"]
    assert [row.prompt for row in source.read(1, 2)] == ["\u7ea2"]


def test_marks_of_joined_files_are_no_text(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    source, _ = open_source(put(tmp_path, "p.txt", mark + b"a\n" + mark + b"b"), {}, 1)
    assert [row.prompt for row in all_rows(source)] == ["a", "b"]
    source, _ = open_source(put(tmp_path, "p.jsonl", b'{"prompt": "a"}\n' + mark + b'{"prompt": "b"}'), {}, 1)
    assert [row.prompt for row in all_rows(source)] == ["a", "b"]


def test_unicode_that_is_cut_off_is_refused_or_lost(tmp_path: Path) -> None:
    cut = codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"x"
    with pytest.raises(FoveateError, match=r"p\.txt is not UTF-16 \(truncated data\); save it as UTF-8"):
        open_source(put(tmp_path, "p.txt", cut), {}, 1)
    half = codecs.BOM_UTF16_LE + "first\n".encode("utf-16-le") + b"\x00\xd8\n\x00" + "last".encode("utf-16-le")
    ((index, *_),) = bad_among(put(tmp_path, "p.txt", half))
    assert index == 1


def test_a_file_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"no row of p\.jsonl can be read; p\.jsonl line 2: not JSON"):
        open_source(put(tmp_path, "p.jsonl", "\na cat\na dog\n"), {}, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_rows_may_lie_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(byte_stream, "BLOCK_BYTES", size)
    monkeypatch.setattr(json_list, "BLOCK_BYTES", size)
    wrong = {"p.txt": ["p.txt line 4"], "p.json": ["p.json entry 3"]}
    for name, text in (
        ("p.txt", "first\r\n\r\ncaf\u00e9\r\0\nlast"),
        ("p.csv", 'prompt,n\r\nfirst,1\r\ncaf\u00e9,2\r\nlast,"3"'),
        ("p.jsonl", '{"prompt": "first"}\r\n\r\n{"prompt": "caf\u00e9"}\n{"prompt": "last"}\n'),
        ("p.json", '[{"prompt": "first"} ,\n {"prompt": "caf\u00e9"},1234, {"prompt": "last"} ]\r\n'),
    ):
        for codec in ("utf-8", "utf-8-sig", "utf-16"):
            found = bad_among(put(tmp_path, name, text.encode(codec)), ["caf\u00e9"])
            assert [where for _, _, where, _ in found] == wrong.get(name, [])


def test_a_row_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_stream, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(byte_stream, "MAX_ROW_BYTES", 5000)
    with pytest.raises(FoveateError, match=r"p\.txt line 2 has over 0 MiB; is it text\?"):
        open_source(put(tmp_path, "p.txt", b"a\n" + b"x" * 9000), {}, 1)
