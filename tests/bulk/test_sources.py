"""Inputs of bulk generation: every format, read from any row on, and what is refused at once."""

import gzip
import hashlib
import json
import pickle
import random
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.bulk import scan
from foveate.bulk.rows import BadRow, Row
from foveate.bulk.sources import open_source
from foveate.core.errors import FoveateError
from foveate.pipeline.options import OPTIONS
from tests.bulk.writing import WRITERS, Cells, all_rows, as_csv, as_lines, as_text, put
from tests.randomness import seed_of

ROWS: list[Cells] = [
    {"id": "a", "prompt": "a red cat", "seed": 7, "source": "one"},
    {"id": "b", "prompt": "caf\u00e9, \u7ea2\u82f9\u679c \U0001f34e", "seed": 8, "source": "two"},
    {"id": "c", "prompt": 'a "quoted" dog', "seed": 2**40, "source": "three"},
]


def refusal(path: Path, columns: dict[str, str] | None = None, limit: int | None = None) -> str:
    with pytest.raises(FoveateError) as raised:
        open_source(path, columns or {}, 10, limit)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_says_the_same(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, name, WRITERS[name](ROWS))
    source, found = open_source(path, {}, 10, None)
    assert (source.name, found.num_rows, found.num_bad) == (name, 3, 0)
    is_text = name.startswith("rows.txt")
    assert all_rows(source) == [
        Row(
            index=index,
            id=str(index) if is_text else row["id"],
            prompt=row["prompt"],
            options={} if is_text else {"seed": row["seed"]},
            extra={} if is_text else {"source": row["source"]},
        )
        for index, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_content_is_hashed_whatever_holds_it(tmp_path: Path, name: str) -> None:
    content = WRITERS[name](ROWS)
    path = put(tmp_path, name, content)
    plain = gzip.decompress(content) if name.endswith(".gz") else content
    for limit in (None, 1):
        source, found = open_source(path, {}, 1, limit)
        assert found.sha256 == hashlib.sha256(plain).hexdigest()
        assert len(all_rows(source)) == found.num_rows == (limit or 3)


def random_rows(chance: random.Random, count: int) -> list[Cells]:
    """Rows with prompts of any characters that a line may hold, and with ids."""
    letters = 'ab ,"\t;#\\\u00e9\u7ea2\U0001f34e\u2028\x85'
    return [
        {"id": f"i{index}", "prompt": f"x{''.join(chance.choices(letters, k=chance.randrange(30)))}x", "seed": index}
        for index in range(count)
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_any_slice_is_that_of_all_rows(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LEAST_STEP", 7)
    chance = random.Random(seed_of(name))
    rows = random_rows(chance, 90)
    for row in chance.sample(rows, 9):
        row["prompt"] += "\0"
    source, _ = open_source(put(tmp_path, name, WRITERS[name](rows)), {}, 7, None)
    expected = all_rows(source)
    assert [isinstance(row, BadRow) or row.prompt for row in expected] == [
        "\0" in row["prompt"] or row["prompt"] for row in rows
    ]
    places = [sorted(chance.choices(range(95), k=2)) for _ in range(6)]
    for start, stop in [(0, 0), (0, 7), (7, 14), (20, 22), (3, 5), (89, 100), (90, 99), *places]:
        assert list(source.read(start, stop)) == expected[start:stop]
        assert list(pickle.loads(pickle.dumps(source)).read(start, stop)) == expected[start:stop]


SCRAPS = st.sampled_from(
    [
        *(
            b"a cat\n",
            b"\n",
            b"\r",
            b"\r\n",
            b"#",
            b'"',
            b",",
            b"\t",
            b"\0",
            b"\xff",
            b"\xef\xbb\xbf",
            b"{",
            b'{"prompt":',
        ),
        *(
            b'"x"}\n',
            b'{"prompt": "a"}\n',
            b'{"prompt": "a"}, ',
            b'"a\nb",',
            b"7",
            b"[",
            b"]",
            b"\\u0000",
            b"\xe9",
            b"nan",
        ),
    ]
)


@settings(max_examples=40)
@given(st.sampled_from(["x.txt", "x.jsonl", "x.csv", "x.tsv", "x.json"]), st.lists(SCRAPS, max_size=30))
def test_whatever_a_file_holds_rows_keep_their_places(name: str, scraps: list[bytes]) -> None:
    head = {"x.csv": b"prompt,seed\n", "x.tsv": b"prompt\tseed\n", "x.json": b"[", "x.jsonl": b'{"prompt": "b"}\n'}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "LEAST_STEP", 2)
        path = put(Path(folder), name, head.get(name, b"b\n") + b"".join(scraps))
        try:
            source, found = open_source(path, {}, 2, None)
        except FoveateError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert "\n" not in message
            return
        rows = all_rows(source)
        assert [row.index for row in rows] == list(range(found.num_rows))
        assert found.num_bad == sum(isinstance(row, BadRow) for row in rows)
        for start in range(len(rows)):
            assert list(source.read(start, start + 2)) == rows[start : start + 2]


def test_rows_in_order_are_read_once_and_threads_do_not_share_a_place(tmp_path: Path) -> None:
    source, _ = open_source(put(tmp_path, "p.csv.gz", gzip.compress(as_csv(random_rows(random.Random(1), 50)))), {}, 5)
    expected = all_rows(source)
    first, second = source.read(0, 20), source.read(10, 30)
    mixed = [next(one) for one in (first, second) for _ in range(5)]
    assert mixed == expected[:5] + expected[10:15]
    assert list(first) + list(second) == expected[5:20] + expected[15:30]


def test_a_folder_is_its_files_in_order_of_their_paths(tmp_path: Path) -> None:
    rows = random_rows(random.Random(seed_of("folder")), 60)
    put(tmp_path, "data/b.jsonl.gz", gzip.compress(as_lines(rows[20:21])))
    put(tmp_path, "data/a/late.ndjson", as_lines(rows[:20]))
    put(tmp_path, "data/c.jsonl", as_lines(rows[21:]))
    put(tmp_path, "data/empty.jsonl", "")
    put(tmp_path, "data/README.md", "not a row")
    put(tmp_path, "data/.cache/x.csv", "prompt\n")
    put(tmp_path, "data/.hidden.csv", "prompt\n")
    source, found = open_source(tmp_path / "data", {}, 10)
    expected = all_rows(source)
    assert (source.name, found.num_rows) == ("data", 60)
    assert [row.prompt for row in expected] == [row["prompt"] for row in rows]
    assert [row.index for row in expected] == list(range(60))
    for start, stop in ((0, 25), (19, 22), (20, 21), (30, 60), (5, 6)):
        assert list(source.read(start, stop)) == expected[start:stop]
    assert open_source(tmp_path / "data", {}, 10, limit=21)[1].num_rows == 21
    put(tmp_path, "data/c.jsonl", as_lines(rows[22:]))
    assert open_source(tmp_path / "data", {}, 10)[1].sha256 != found.sha256


def test_places_in_a_folder_name_the_file(tmp_path: Path) -> None:
    put(tmp_path, "d/a.csv", "prompt,n\na,1\n")
    put(tmp_path, "d/in/b.csv", "n,prompt\n1,b\nx,c\n")
    source, _found = open_source(tmp_path / "d", {}, 10)
    rows = all_rows(source)
    assert [row.num_images for row in rows[:2]] == [1, 1]
    assert rows[2] == BadRow(index=2, id="2", where="in/b.csv line 3", reason="n must be a whole number, got 'x'")


def test_several_formats_in_a_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "d/a.csv", "prompt\na\n")
    put(tmp_path, "d/b.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    assert "files of several formats, .csv and .jsonl; move all but one" in refusal(tmp_path / "d")
    (tmp_path / "none").mkdir()
    assert "has no file with a known ending; there are .txt, .jsonl" in refusal(tmp_path / "none")


@pytest.mark.parametrize("name", [name for name in WRITERS if "parquet" not in name])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, gzip.compress(b"") if name.endswith(".gz") else b"")
    assert "empty" in (said := refusal(tmp_path / name)) or "has no rows" in said


def test_lists_and_tables_without_rows_are_refused(tmp_path: Path) -> None:
    assert "has no rows" in refusal(put(tmp_path, "a.json", " [ ] \n"))
    assert "has no rows" in refusal(put(tmp_path, "a.csv", "prompt,seed\r\n\r\n"))
    assert "has no rows" in refusal(put(tmp_path, "a.txt", "# only\n\n  # comments"))


def test_what_cannot_be_an_input_is_refused(tmp_path: Path) -> None:
    assert "stdin cannot be read twice, and a run that was stopped reads its input again" in refusal(Path("-"))
    assert "there is no file or folder" in refusal(tmp_path / "none.csv")
    assert "has no known ending; there are .txt" in refusal(put(tmp_path, "a.xlsx", "x"))
    assert "has no known ending" in refusal(put(tmp_path, "a.parquet.gz", "x"))
    assert "limit must be 1 row or more, got 0" in refusal(put(tmp_path, "a.txt", "x"), limit=0)
    assert "has a prompt a line and no columns" in refusal(tmp_path / "a.txt", {"prompt": "x"})
    assert "no-pipe" not in refusal(Path("/dev/null"))


@pytest.mark.parametrize(
    "data", [b"no gzip at all", gzip.compress(as_text(ROWS))[:-12], gzip.compress(b"x\n") + b"junk"]
)
def test_damaged_compression_is_one_line(tmp_path: Path, data: bytes) -> None:
    assert "a.txt.gz is damaged or cut off" in refusal(put(tmp_path, "a.txt.gz", data))


def test_damaged_lists_and_parquet_are_one_line(tmp_path: Path) -> None:
    assert "b.parquet as parquet" in refusal(put(tmp_path, "b.parquet", b"PAR1 and nothing else"))
    for text, why in (
        ('{"prompt": "a"}', "is not a list of objects; an object a line is .jsonl"),
        ('[{"prompt": "a"}, {"prompt": ]', "entry 2: not JSON: Expecting value"),
        ('[{"prompt": "a"} {"prompt": "b"}]', "entry 1: a comma or ] is missing behind it"),
        ('[{"prompt": "a"},', "entry 2: not JSON"),
        ('[{"prompt": "a"}', "entry 1: a comma or ] is missing"),
        ('[{"prompt": "a"}]]', "goes on behind its list"),
        ("[" * 100_000, "entry 1: not JSON: lists or objects are too deep"),
    ):
        assert why in refusal(put(tmp_path, "b.json", text))


def test_ids_that_are_there_twice_are_refused_with_both_places(tmp_path: Path) -> None:
    path = put(
        tmp_path, "p.jsonl", '{"id": "x", "prompt": "a"}\n\n{"id": 7, "prompt": "b"}\n{"id": "7", "prompt": 1.5}\n'
    )
    assert "the id '7' is there twice, in p.jsonl line 3 and p.jsonl line 4; ids name images" in refusal(path)
    assert open_source(path, {}, 10, limit=2)[1].num_rows == 2
    put(tmp_path, "d/a.csv", "id,prompt\n1,a\n")
    put(tmp_path, "d/b.csv", 'prompt,id\n"a\nb",2\nb,1\n')
    assert "'1' is there twice, in a.csv line 2 and b.csv line 4" in refusal(tmp_path / "d")


def test_one_hash_of_two_ids_is_no_duplicate() -> None:
    names = ["a", "b", "c"]

    def ids() -> Iterator[tuple[str, str]]:
        return ((name, f"line {place}") for place, name in enumerate(names))

    same = array("q", [hash("a"), hash("c"), hash("a"), 5])
    assert scan.find_duplicate(same, ids) is None
    names.append("a")
    assert scan.find_duplicate(same, ids) == ("a", "line 0", "line 3")
    assert scan.find_duplicate(array("q"), ids) is None


def test_many_hashes_are_looked_at_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_MOST_SUSPECTS", 2)
    monkeypatch.setattr(scan, "_CHUNK", 3)
    names = [str(number) for number in range(20)]
    hashes = array("q", [hash(name) for name in names] * 2)
    assert scan.find_duplicate(hashes, lambda: ((name, name) for name in names)) is None
    hashes = array("q", [hash(name) for name in names] * 2)
    found = scan.find_duplicate(hashes, lambda: ((name, str(place)) for place, name in enumerate([*names, "11"])))
    assert found == ("11", "11", "20")


def test_where_some_rows_have_ids_all_need_one(tmp_path: Path) -> None:
    path = put(tmp_path, "p.csv", "prompt,id\na,\nb,x\nc,1\n")
    source, found = open_source(path, {}, 10)
    assert found.num_bad == 1
    bad, *others = all_rows(source)
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith("no id, but other rows have one")
    assert [row.id for row in others] == ["x", "1"]
    none, found = open_source(put(tmp_path, "q.csv", "prompt,id\na,\nb,\n"), {}, 10)
    assert found.num_bad == 0
    assert [row.id for row in all_rows(none)] == ["0", "1"]


def test_a_file_that_changes_behind_its_scan_is_not_read_on(tmp_path: Path) -> None:
    path = put(tmp_path, "p.jsonl", as_lines(ROWS))
    source, _ = open_source(path, {}, 1)
    put(tmp_path, "p.jsonl", as_lines(ROWS[1:]))
    with pytest.raises(FoveateError, match=r"p\.jsonl has changed since it was scanned; start the same command again"):
        all_rows(source)
    path.unlink()
    with pytest.raises(FoveateError, match=r"cannot read p\.jsonl: No such file"):
        all_rows(source)


def test_memory_and_marks_are_bounded(tmp_path: Path) -> None:
    text = "".join(f'{{"prompt": "p{index}"}}\n' for index in range(1200))
    source, _ = open_source(put(tmp_path, "p.jsonl", text), {}, 300)
    assert len(pickle.dumps(source)) < 1500
    tiny, _ = open_source(tmp_path / "p.jsonl", {}, 1)
    assert len(pickle.dumps(tiny)) < 2500
    assert [row.prompt for row in tiny.read(1199, 1201)] == ["p1199"]


def test_every_option_has_a_column_or_a_reason(tmp_path: Path) -> None:
    for name, option in OPTIONS.items():
        path = put(tmp_path, "p.jsonl", json.dumps({"prompt": "a", name: None}) + "\n")
        if option.not_in_rows:
            assert option.not_in_rows in refusal(path)
            assert option.not_in_rows in refusal(put(tmp_path, "p.csv", f"prompt,{name}\na,\n"))
        else:
            assert open_source(path, {}, 10)[1].extra_columns == ()
