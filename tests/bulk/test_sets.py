"""Evaluation sets: what is read of the files that projects publish, and of what their scorers write."""

import json
import pickle
from pathlib import Path

import pytest

from foveate.bulk.sets import SETS, find_set, open_set, read_scores
from foveate.bulk.sources import Source
from foveate.core.errors import FoveateError
from tests.bulk.set_cases import GENEVAL, WRITERS, rows_of, write_dpg_questions, write_hps, write_parti

PUBLISHED = {
    "geneval": [
        ("00000", "a photo of our kite", {"tag": "single_object", "include": [{"class": "kite", "count": 1}]}),
        ("00001", "a photo of two of our kites", {k: v for k, v in GENEVAL[1].items() if k != "prompt"}),
    ],
    "dpg": [("0", "Our long first prompt.", {}), ("whoops7", "Our second, with an emu.", {})],
    "parti": [
        ("00000", '"O U R S" on a wall', {"Category": "Illustrations", "Challenge": "Writing & Symbols"}),
        ("00001", "ours", {"Category": "Abstract", "Challenge": "Basic", "Note": "one word"}),
    ],
    "drawbench": [
        ("00000", "Our red one, and a blue one.", {"Category": "Colors"}),
        ("00001", "Three of ours.", {"Category": "Counting"}),
    ],
    "hps": [
        (f"{style}-0000{index}", f"our {style} {index}", {"style": style, "style_index": index})
        for style in ("anime", "concept-art", "paintings", "photo")
        for index in range(2)
    ],
    "imagereward": [("005695-0057", "our ship", {}), ("000001-0002", "ours", {})],
}


def test_every_set_has_a_case() -> None:
    assert set(SETS) == set(WRITERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", SETS)
def test_the_published_file_is_read_whole(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path)
    source, scan = open_set(name, path)
    assert isinstance(source, Source)
    rows = rows_of(name, path)
    assert [(row.id, row.prompt, dict(row.extra)) for row in rows] == PUBLISHED[name]
    assert [row.index for row in rows] == list(range(len(rows))) == list(range(scan.num_rows))
    assert all(not row.options for row in rows)
    assert [row.id for row in pickle.loads(pickle.dumps(source)).read(1, 2)] == [rows[1].id], "workers get a copy"
    assert list(source.read(len(rows), len(rows) + 5)) == []


def test_questions_of_dpg_bench_are_the_same_rows_as_its_prompts(tmp_path: Path) -> None:
    found = rows_of("dpg", write_dpg_questions(tmp_path))
    assert [(row.id, row.prompt) for row in found] == [(name, prompt) for name, prompt, _ in PUBLISHED["dpg"]]


def test_a_limit_leaves_the_content_as_it_is(tmp_path: Path) -> None:
    path = write_parti(tmp_path)
    source, scan = open_set("parti", path, limit=1)
    assert (scan.num_rows, len(list(source.read(0, 9)))) == (1, 1)
    assert scan.sha256 == open_set("parti", path)[1].sha256
    path.write_bytes(path.read_bytes().replace(b"one word", b"two words"))
    assert scan.sha256 != open_set("parti", path)[1].sha256
    with pytest.raises(FoveateError, match="the limit must be 1 row or more, got 0"):
        open_set("parti", path, limit=0)


def test_one_style_and_a_list_of_drawbench_do(tmp_path: Path) -> None:
    folder = write_hps(tmp_path)
    assert [row.id for row in rows_of("hps", folder / "photo.json")] == ["photo-00000", "photo-00001"]
    assert [row.prompt for row in rows_of("drawbench", folder / "drawbench.json")] == ["ours of another set"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("geneval", "m.jsonl", '{"tag": "a", "prompt": "x"}\n{"tag": 1}\n', "m.jsonl line 2 is no object with a tag"),
        ("geneval", "m.jsonl", '{"tag": "a", "prompt": "x"}\n{"tag"\n', "m.jsonl line 2 is not JSON"),
        ("geneval", "m.jsonl", '{"tag": "a", "prompt": " "}\n', "m.jsonl line 1 has no prompt"),
        ("geneval", "m.jsonl", "\n\n", "m.jsonl has no prompts"),
        ("dpg", "q.csv", "text\nours\n", "has no column item_id"),
        ("dpg", "q.csv", "item_id,text\na.b,ours\n", r"q.csv row 1: the id 'a.b' must be letters"),
        ("parti", "p.tsv", "Prompt,Category\nours,Abstract\n", "has no column Prompt"),
        ("drawbench", "d.csv", "Prompts,Category\n,Colors\n", "row 1 has no prompt"),
        ("drawbench", "d.json", '{"a": 1}', "is no list of texts"),
        ("hps", "pictures.json", '["ours"]', "must be named after its style: anime.json"),
        ("imagereward", "b.json", '[{"id": "1", "prompt": "a"}, {"id": "1", "prompt": "b"}]', "has the id '1' twice"),
        ("imagereward", "b.json", '[{"id": "../x", "prompt": "a"}]', "must be letters, digits"),
        ("imagereward", "b.json", '["ours"]', "is no list of objects"),
        ("imagereward", "b.json", "\xff", "is not JSON"),
    ],
)
def test_what_is_not_the_published_form_is_refused(
    name: str, file: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(FoveateError, match=message) as caught:
        open_set(name, tmp_path / file)
    assert "\n" not in str(caught.value)


def test_missing_files_and_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="GenEval reads evaluation_metadata.jsonl, which its project publishes"):
        open_set("geneval", tmp_path / "none.jsonl")
    with pytest.raises(FoveateError, match="did you mean drawbench"):
        find_set("drawbenck")
    (write_hps(tmp_path) / "paintings.json").unlink()
    with pytest.raises(FoveateError, match=r"there is no .*paintings.json"):
        open_set("hps", tmp_path / "benchmark")


def test_geneval_is_the_mean_over_tags(tmp_path: Path) -> None:
    # As evaluation/summary_scores.py of djghosh13/geneval sums up: images, prompts, and the mean of the tags' shares.
    kite, two = map(json.dumps, GENEVAL)
    images = [("single_object", kite, True)] * 3 + [("single_object", kite, False), ("counting", two, False)]
    path = tmp_path / "results.jsonl"
    lines = [{"filename": "x", "tag": t, "correct": c, "reason": "", "metadata": m} for t, m, c in images]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_scores("geneval", path)
    assert found.overall == pytest.approx({"score": 0.375, "correct_images": 0.6, "correct_prompts": 0.5})
    assert found.figures()["geneval.single_object.score"] == pytest.approx(0.75)
    assert found.figures()["geneval.counting.score"] == 0
    assert found.labels()["geneval.counting.score"] == "geneval, counting"
    path.write_text('{"tag": "a"}\n')
    with pytest.raises(FoveateError, match="line 1 has no tag or no correct"):
        read_scores("geneval", path)


def test_dpg_bench_has_two_levels_of_categories(tmp_path: Path) -> None:
    path = tmp_path / "dpg-bench_results.txt"
    text = (
        "images/0.png, 1.0, 0.5, 0.75\nModel: images\nL1 category scores:\n\tentity: 85.5\n\tattribute: 70.0\n"
        "L2 category scores:\n\tattribute - color: 71.25\n\tentity - whole: 85.5\nImage path: images\n"
        "Save results to: r.txt\n"
    )
    path.write_text(text + "DPG-Bench score: 74.25\n")
    figures = read_scores("dpg", path).figures()
    assert figures == {
        "dpg.score": 74.25,
        "dpg.entity.score": 85.5,
        "dpg.attribute.score": 70.0,
        "dpg.attribute_color.score": 71.25,
        "dpg.entity_whole.score": 85.5,
    }
    path.write_text(text)
    with pytest.raises(FoveateError, match="has no DPG-Bench score"):
        read_scores("dpg", path)


def test_hpsv2_is_read_from_what_it_prints(tmp_path: Path) -> None:
    path = tmp_path / "hps.txt"
    text = (
        "Loading model ...\nLoading model successfully!\n-----------benchmark score ---------------- \n"
        "my run anime           28.31 \t 0.2101\nmy run photo           26.05 \t 0.0999\n"
    )
    path.write_text(text + "my run Average         27.18 \t\n")
    figures = read_scores("hps", path).figures()
    assert figures == {"hps.score": 27.18, "hps.anime.score": 28.31, "hps.photo.score": 26.05}
    path.write_text(text)
    with pytest.raises(FoveateError, match="has no line Average"):
        read_scores("hps", path)
    path.write_text(text + "other Average         27.18 \t\n")
    with pytest.raises(FoveateError, match="has scores of several models"):
        read_scores("hps", path)


def test_imagereward_is_the_mean_of_prompts(tmp_path: Path) -> None:
    items = [{"id": "a", "prompt": "x", "mean_score": 0.5, "rewards": [0.25, 0.75]}, {"id": "b", "mean_score": -1.0}]
    path = tmp_path / "ImageReward-v1.0-benchmark-full-result.json"
    path.write_text(json.dumps(items))
    assert read_scores("imagereward", path).figures() == {"imagereward.score": -0.25}
    other = path.rename(tmp_path / "CLIP-benchmark-full-result.json")
    assert read_scores("imagereward", other).figures() == {"clip.score": -0.25}
    other.write_text('{"full": 0.5}')
    with pytest.raises(FoveateError, match="has no mean_score for every prompt"):
        read_scores("imagereward", other)


def test_a_table_of_any_scorer_has_figures_per_category(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(
        "file_name,prompt,Category,Challenge,CLIP score\n00000-0.png,ours,Arts,Basic,0.25\n00001-0.png,x,Arts,,0.75\n"
    )
    lines = tmp_path / "scores.jsonl"
    lines.write_text(
        '{"file_name": "00000-0.png", "Category": "Arts", "Challenge": "Basic", "CLIP score": 0.25, "by": 1}\n'
        '{"file_name": "00001-0.png", "Category": "Arts", "CLIP score": 0.75, "by": "you"}\n'
    )
    for file in (path, lines):
        assert read_scores("parti", file).figures() == {
            "parti.clip_score": 0.5,
            "parti.arts.clip_score": 0.5,
            "parti.basic.clip_score": 0.25,
        }
    path.write_text("file_name,Category\na.png,Arts\n")
    with pytest.raises(FoveateError, match="has no column of numbers"):
        read_scores("drawbench", path)
