"""Two runs of `foveate batch` beside each other: what is paired, counted, scored and reported."""

import csv
import io
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.bulk.compare import _Scorer, compare_runs
from foveate.bulk.manifest import Item
from foveate.bulk.output import OutputFolder
from foveate.bulk.pairing import Pair, Pairing
from foveate.bulk.rows import Row
from foveate.bulk.runs_report import RunsReport
from foveate.bulk.sets import read_scores
from foveate.cli.main import main
from foveate.core.errors import FoveateError
from foveate.eval.pairs import PairScores, fidelity, score_pairs
from tests.bulk.set_cases import failure_of, item_of, pixels_of, run_of

SIDE = 16


class Brightness:
    """Judges by the mean of all levels, whatever the reference."""

    name, is_error = "brightness", False

    def score(self, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """The mean, in [0, 255]."""
        assert len(prompts) == len(images) == len(references)
        return np.asarray(images.mean(axis=(1, 2, 3)), dtype=np.float64)


def a_row(index: int, name: str | None = None, prompt: str | None = None) -> Row:
    """A row that says nothing but its prompt."""
    return Row(index=index, id=name or f"a{index}", prompt=prompt or f"prompt {index}", options={}, extra={})


def noisy(row: int, image: int, side: int = SIDE) -> np.ndarray:
    """The image of the reference with noise that grows with the row."""
    noise = np.random.default_rng((row, image)).normal(0, 3 + 4 * row, (side, side, 3))
    return np.clip(pixels_of(row, image, side, side) + noise, 0, 255).astype(np.uint8)


def reference_item(row: int, image: int, **entry: Any) -> Item:
    """Of the reference, which runs everything."""
    return item_of(a_row(row), image, flops_run=100, **entry)


def other_item(row: int, image: int, **entry: Any) -> Item:
    """Of the run in question."""
    return item_of(a_row(row), image, pixels=noisy(row, image), policy="fovea", policy_fingerprint="g", **entry)


def runs_of(folder: Path, counts: Sequence[int]) -> tuple[OutputFolder, OutputFolder]:
    """Two runs of rows with so many images each, in shards of two rows."""

    def shards(item: Callable[[int, int], Item]) -> dict[int, list[Item]]:
        found: dict[int, list[Item]] = {}
        for row, count in enumerate(counts):
            found.setdefault(row // 2, []).extend(item(row, image) for image in range(count))
        return found

    reference = run_of(folder / "full", shards(reference_item), model={"name": "toy"}, seed=7)
    return reference, run_of(folder / "fovea", shards(other_item), model={"name": "toy"}, seed=7)


def compared(runs: tuple[OutputFolder, OutputFolder], **options: Any) -> RunsReport:
    """Without progress."""
    return compare_runs(*runs, hides_progress=True, **options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_are_those_of_the_same_arrays(tmp_path: Path, batch_size: int) -> None:
    counts = [2, 1, 3]
    places = [(row, image) for row, count in enumerate(counts) for image in range(count)]
    report = compared(runs_of(tmp_path, counts), judges=[Brightness()], batch_size=batch_size)
    images = np.stack([noisy(*place) for place in places])
    references = np.stack([pixels_of(*place) for place in places])
    prompts = [f"prompt {row}" for row, _ in places]
    expected = fidelity(score_pairs(images, references, prompts, [Brightness()]), counts)
    assert report.fidelity == expected
    assert report.other.flops_ratio == 0.6
    assert report.reference.flops_ratio == 1
    assert report.reference.judged is not None
    assert report.reference.judged.judged["brightness"].mean == pytest.approx(references.mean())
    assert report.counts.pairs == 6
    assert list(report.notes()) == []


def test_the_worst_pairs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.bulk.compare.MOST_SHOWN", 2)
    report = compared(runs_of(tmp_path, [1, 1, 1, 1, 1]))
    assert [shown.row.prompt for shown in report.shown] == ["prompt 3", "prompt 4"], "noise grows with the row"
    np.testing.assert_array_equal(report.shown[1].picture, noisy(4, 0))
    np.testing.assert_array_equal(report.shown[1].reference, pixels_of(4, 0))


def test_everything_that_cannot_be_compared_is_counted_and_said(tmp_path: Path) -> None:
    wide = pixels_of(4, 0, 24, 16)
    reference = [reference_item(0, 0), reference_item(0, 1), *(reference_item(row, 0) for row in range(1, 6))]
    other = [
        failure_of(a_row(0), 0),
        other_item(0, 1),
        failure_of(a_row(1), None),
        item_of(a_row(2, prompt="something else"), 0),
        other_item(3, 0, seed=5),
        item_of(a_row(4), 0, pixels=wide),
        other_item(5, 0),
        other_item(5, 1),
        other_item(6, 0),
        other_item(7, 0),
    ]
    report = compared((run_of(tmp_path / "a", {0: reference}), run_of(tmp_path / "b", {0: other})))
    counts = report.counts
    assert (counts.rows, counts.pairs, report.fidelity.num_images) == (6, 3, 3)
    assert counts.only == {"reference": 0, "other": 2}
    assert counts.failed == {"reference": 0, "other": 2}
    assert counts.unpaired == {"reference": 2, "other": 1}
    assert (counts.other_prompts, counts.other_sizes, counts.other_seeds) == (1, 1, 1)
    notes = "\n".join(report.notes())
    assert "2 rows are only there, 2 failures in rows of both, 1 images have no partner" in notes
    assert "left out: 1 pairs of other prompts, 1 pairs of other sizes" in notes
    assert "1 of 3 pairs have other seeds: PSNR, SSIM and FLIP compare different draws there" in notes


def test_rows_are_found_by_their_id_wherever_they_stand(tmp_path: Path) -> None:
    reference = [item_of(a_row(index, name), 0) for index, name in enumerate("abcde")]
    some = [item_of(a_row(index, name), 0) for index, name in enumerate("bxe")]
    pairing = Pairing(run_of(tmp_path / "a", {0: reference[:2], 3: reference[2:]}), run_of(tmp_path / "b", {0: some}))
    assert [pair.reference["id"] for pair in pairing.pairs()] == []
    assert pairing.counts.other_prompts == 2, "row 1 is prompt 1 here and prompt 0 there"
    turned = [item_of(a_row(index, name), 0) for index, name in enumerate("eb")]
    with pytest.raises(FoveateError, match="have their rows in another order: 'b' of .* stands where .* has 'e'"):
        list(Pairing(OutputFolder.read(tmp_path / "a"), run_of(tmp_path / "c", {0: turned})).pairs())


def test_sizes_may_differ_between_rows(tmp_path: Path) -> None:
    sides = [16, 16, 24, 16]
    items = [
        [item_of(a_row(row), 0, pixels=pixels_of(row, shift, side, side)) for row, side in enumerate(sides)]
        for shift in (0, 1)
    ]
    runs = run_of(tmp_path / "a", {0: items[0]}), run_of(tmp_path / "b", {0: items[1]})
    found = compared(runs, batch_size=8)
    assert found.fidelity == compared(runs, batch_size=1).fidelity
    assert found.fidelity.num_images == 4


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    reference, other = [item_of(a_row(0, "x"), 0)], [item_of(a_row(0, "y"), 0)]
    with pytest.raises(FoveateError, match="have no pair of images to compare: 0 rows in both"):
        compared((run_of(tmp_path / "a", {0: reference}), run_of(tmp_path / "b", {0: other})))


def test_memory_holds_no_images_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.bulk.compare.MOST_SHOWN", 2)
    monkeypatch.setattr("foveate.eval.statistics._CHUNK", 1000)
    side = 32
    peaks = []
    for number in (4, 24):
        runs = [
            run_of(
                tmp_path / f"{number} {name}",
                {0: [item_of(a_row(row), 0, pixels=pixels_of(row, shift, side, side)) for row in range(number)]},
            )
            for shift, name in enumerate(("a", "b"))
        ]
        tracemalloc.start()
        report = compared((runs[0], runs[1]), batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.fidelity.num_images == number
    held = 2 * side * side * 3 * (24 - 4)
    assert peaks[1] - peaks[0] < held / 2, f"peaks of 4 and 24 pairs: {peaks}"


@pytest.mark.soak
def test_pairing_takes_some_bytes_a_row(tmp_path: Path) -> None:
    num_rows = 10_000
    entry = reference_item(0, 0).entry
    items = [Item({**entry, "row": row, "id": f"a{row}"}, b"%d" % row) for row in range(num_rows)]
    run = run_of(tmp_path / "a", {0: items})
    del items
    peaks = []
    for _ in range(2):  # What is allocated once does not count.
        tracemalloc.start()
        assert sum(1 for _ in Pairing(run, run).pairs()) == num_rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 60 * num_rows, f"{min(peaks) / num_rows:.0f} bytes a row"


def test_ctrl_c_reports_what_was_scored(tmp_path: Path) -> None:
    class Impatient(Brightness):
        def score(self, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
            if prompts[0] == "prompt 2":
                raise KeyboardInterrupt
            return super().score(images, references, prompts)

    report = compared(runs_of(tmp_path, [1, 1, 1, 1]), judges=[Impatient()])
    assert report.is_interrupted
    assert report.fidelity.num_images == 2
    assert "interrupted: figures are of the first 2 pairs" in list(report.notes())


@pytest.mark.parametrize("kept", [0, 2])
def test_ctrl_c_in_the_middle_of_a_batch_leaves_it_out(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = _Scorer._keep

    def interrupted(scorer: _Scorer, pair: Pair, scores: PairScores) -> None:
        if len(scorer.columns) > kept:
            raise KeyboardInterrupt
        keep(scorer, pair, scores)

    monkeypatch.setattr(_Scorer, "_keep", interrupted)
    runs = runs_of(tmp_path, [2, 1])
    if kept == 0:
        with pytest.raises(KeyboardInterrupt):
            compared(runs)
    else:
        report = compared(runs)
        assert (report.is_interrupted, report.fidelity.num_images) == (True, 2)


def _geneval(path: Path, correct: Sequence[bool]) -> Path:
    lines = [{"tag": "counting", "correct": one, "metadata": str(i)} for i, one in enumerate(correct)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command line beside two runs, `full` and `fovea`; gives its code and both streams."""
    runs_of(tmp_path, [1, 1, 1])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


RUNS = ("--manifest", "full", "--manifest", "fovea")


def test_the_command_writes_figures_page_and_table(call: Callable[..., Any], tmp_path: Path) -> None:
    _geneval(tmp_path / "a.jsonl", [True, True])
    _geneval(tmp_path / "b.jsonl", [True, False])
    scored = ("--prompts-set", "geneval", "--scores", "a.jsonl", "--scores", "b.jsonl")
    code, out, err = call(
        *RUNS, *scored, "--json", "--html", "r.html", "--csv", "r.csv",
        "--fail-if", "geneval.score < 0.9", "--fail-if", "flops_ratio > 0.7",
    )  # fmt: skip
    assert code == 1
    assert err == "foveate: warning: geneval.score < 0.9 holds: geneval.score is 0.5\n"
    data = json.loads(out)
    assert (data["n"], data["flops_ratio"], data["policy"]) == (3, 0.6, ["fovea"])
    assert data["intervals"]["psnr.mean"][0] <= data["psnr"]["mean"] <= data["intervals"]["psnr.mean"][1]
    assert data["scores"]["overall"]["score"] == 0.5
    assert data["reference"]["scores"]["categories"] == {"counting": {"score": 1.0}}
    other, reference = csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))
    assert (other["policy"], other["role"], reference["policy"], reference["role"]) == (
        "fovea", "policy", "full", "reference",
    )  # fmt: skip
    assert float(other["psnr.mean"]) == pytest.approx(data["psnr"]["mean"])
    assert (reference["psnr.mean"], reference["flops_ratio"], reference["geneval.score"]) == ("", "1", "1")
    page = (tmp_path / "r.html").read_text()
    assert "fovea (fovea) against full (full)" in page
    assert "What the scorer said" in page
    assert "prompt 2" in page
    code, out, err = call(*RUNS, *scored)
    assert (code, err) == (0, "")
    head, first, last = out.splitlines()
    assert head.split()[:2] == ["run", "FLOPs"]
    assert first.startswith("fovea (fovea)")
    assert "0 of 3" in first
    assert last.startswith("full (full) (reference)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RUNS, "--policy", "fovea", "-m", "toy", "--size", "64x64", "--seeds", "2", "--cfg", "3", "--controls"),
         "so --policy, --controls, --seeds, --size, --guidance-scale, --model would be ignored"),
        ((*RUNS[:2],), "--manifest must be given twice, the reference first, got 1"),
        ((*RUNS, "--manifest", "full"), "--manifest must be given twice, the reference first, got 3"),
        ((*RUNS[:2], "--manifest", "none"), "none has no run.json"),
        ((*RUNS, "--scores", "a"), "--scores and --prompts-set belong together"),
        ((*RUNS, "--prompts-set", "geneval"), "--scores and --prompts-set belong together"),
        ((*RUNS, "--prompts-set", "dpg", "--scores", "a"), "--scores must be given twice"),
        ((*RUNS, "--prompts-set", "dgp", "--scores", "a", "--scores", "b"), "no prompt set 'dgp'; did you mean dpg?"),
        ((*RUNS, "--prompts-set", "dpg", "--scores", "a", "--scores", "b"), "cannot read scores from a"),
        ((*RUNS, "--fail-if", "speedup.transformer < 1"), "finished runs have no speedup.transformer"),
        ((*RUNS, "--fail-if", "fovea psnr.mean < 1"), "bounds are on the second run; leave the policy out"),
        ((*RUNS, "--fail-if", "geneval.score < 1"), "no figure 'geneval.score'"),
        ((*RUNS, "--judge", "nobody"), "no judge 'nobody'"),
        ((*RUNS, "--batch-size", "0"), "--batch-size must be 1 or more, got 0"),
        ((*RUNS, "--html", "r", "--csv", "r"), "--html and --csv name the same file"),
        (("-p", "full", "--scores", "a"), "--scores belongs to runs that were generated"),
        (("-p", "full", "--prompts-set", "dpg"), "--prompts-set belongs to runs that were generated"),
        ((), "compare needs --policy, or --manifest twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    call: Callable[..., Any], arguments: Sequence[str], message: str
) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_lossy_images_other_weights_and_settings_are_said(tmp_path: Path) -> None:
    items = [reference_item(0, 0, weights_sha256="1"), reference_item(1, 0, weights_sha256="1")]
    jpegs = [item_of(a_row(row), 0, "jpeg", weights_sha256="2") for row in range(2)]
    runs = run_of(tmp_path / "a", {0: items}, seed=7), run_of(tmp_path / "b", {0: jpegs}, seed=8)
    notes = "\n".join(compared(runs).notes())
    assert "b holds lossy jpeg: figures include what that loses" in notes
    assert "the runs are of different weights" in notes
    assert "settings of the reference and of the other run: seed was 7, is 8" in notes


def test_scores_of_one_set_have_one_name(tmp_path: Path) -> None:
    scores = read_scores("geneval", _geneval(tmp_path / "a.jsonl", [True, False]))
    report = compared(runs_of(tmp_path, [1, 1]), scores=(scores, scores))
    assert report.figures()["geneval.counting.score"] == 0.5
    assert report.table()[0][-3:] == ("geneval.score", "geneval.correct_images", "geneval.correct_prompts")
