"""Names of files, and the folder in which they wait: nothing is replaced, nothing is lost, nothing is left behind."""

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.cli.staging import NAME_BYTES, Staging, slug
from foveate.core.errors import FoveateError
from tests.core.test_atomic import umask

LONGEST = "-9223372036854775807-99999-scale-07.webp"
"""What may follow a slug: the largest seed, a number, and the longest ending."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, *files: str, text: str = "new") -> dict[str, Path]:
    with Staging(folder) as staging:
        for file in files:
            staging.path(file).write_text(text)
        return staging.publish()


def write_and_raise(folder: Path, error: BaseException) -> None:
    with Staging(folder) as staging:
        staging.path("a").write_text("1")
        raise error


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("\u7ea2" * 100, "\u7ea2" * 30),
        ("\U00020000" * 100, "\U00020000" * 22),
        ("e\u0301" * 100, "\u00e9" * 45),
        # A letter of Hindi with its vowel signs, and letters that a virama joins.
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u0939\u0948", "\u0939\u093f\u0928\u094d\u0926\u0940-\u0939\u0948"),
        ("\u0915\u094d\u0937" * 50, "\u0915\u094d\u0937" * 10),
        ("x\u0323\u0307" * 100, "\u1e8b\u0323" * 18),
        ("x" + "\u0323" * 200, "image"),
        ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"),
        # Half-joined letters of Persian, and a syllable in parts.
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", "\u0645\u06cc\u0631\u0648\u0645"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("CON", "con-image"),
        ("Lpt1", "lpt1-image"),
        ("com\u00b9", "com1-image"),
        ("nul.txt", "nul-txt"),
        ('a<b>:"c/d\\e|f?*\0g. ', "a-b-c-d-e-f-g"),
        ("\udcff\ud800 cat", "cat"),
        ("\u2764\ufe0f\u200d\U0001f525", "image"),
        ("a\n\tb", "a-b"),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert slug(prompt) == name


@given(st.text(st.characters(exclude_categories=[]), min_size=1, max_size=300))
def test_a_slug_fits_every_file_system(prompt: str) -> None:
    name = slug(prompt)
    assert len((name + LONGEST).encode()) <= NAME_BYTES
    assert not set('<>:"/\\|?*. ') & set(name)
    assert name.isprintable()
    assert unicodedata.normalize("NFC", name) == name
    assert slug(name) == name, "a name is its own slug"


def test_a_slug_is_a_file_in_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(name: str) -> bytes:
        return name.encode("ascii", "surrogateescape")

    monkeypatch.setattr("foveate.cli.staging.os.fsencode", encode)
    monkeypatch.setattr("foveate.cli.staging.os.fsdecode", lambda data: data.decode("ascii", "surrogateescape"))
    assert encode(slug("\u7ea2 cat")) == "\u7ea2-cat".encode()
    assert slug("cat") == "cat"


def test_names_that_are_taken_get_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endings = (".png", "-scale-00.png")
    for expected in ("cat-7", "cat-7-2", "cat-7-3"):
        with Staging(tmp_path) as staging:
            assert staging.free_stem("cat-7", endings) == expected
            for ending in endings:
                staging.path(expected + ending).write_text(expected)
            places = staging.publish()
        assert places == {expected + ending: tmp_path / (expected + ending) for ending in endings}
        said = f"foveate: cat-7.png is already in {tmp_path}; the new file is {expected}.png, and 1 more\n"
        assert capsys.readouterr().err == ("" if expected == "cat-7" else said)
    assert len(names(tmp_path)) == 6
    assert all((tmp_path / f"{stem}.png").read_text() == stem for stem in ("cat-7", "cat-7-2", "cat-7-3"))


def test_a_name_is_taken_if_any_of_its_files_is(tmp_path: Path) -> None:
    (tmp_path / "a-map.png").touch()
    (tmp_path / "b.png").symlink_to("nothing")
    with Staging(tmp_path) as staging:
        assert staging.free_stem("a", (".png", "-map.png")) == "a-2"
        assert staging.free_stem("b", (".png",)) == "b-2"


def test_names_of_one_command_repeat_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Staging(tmp_path) as staging:
        for batch in (["a", "a-2"], ["a-3", "a-4"]):
            for expected in batch:
                assert staging.free_stem("a", (".png",)) == expected
                staging.path(f"{expected}.png").touch()
            staging.publish()
        # The preview of one image would be the image of another.
        assert staging.free_stem("b", (".png", "-scale-10.png")) == "b"
        assert staging.free_stem("b-scale-10", (".png",)) == "b-scale-10-2"
    assert names(tmp_path) == ["a-2.png", "a-3.png", "a-4.png", "a.png"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("has_links", [True, False])
def test_two_commands_at_once_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_links: bool
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("foveate.cli.staging.os.link", refuse)
    with Staging(tmp_path) as staging:
        stem = staging.free_stem("a", (".png",))
        staging.path(f"{stem}.png").write_text("second")
        (tmp_path / "a.png").write_text("first")
        assert staging.publish() == {"a.png": tmp_path / "a-2.png"}
    assert [(tmp_path / name).read_text() for name in ("a.png", "a-2.png")] == ["first", "second"]
    assert capsys.readouterr().err == f"foveate: a.png is already in {tmp_path}; the new file is a-2.png\n"


def test_a_name_that_was_asked_for_holds_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("one", "two", "two", "three"):
        assert write(tmp_path, "r.html", text=text) == {"r.html": tmp_path / "r.html"}
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "r.html": "three", "r-2.html": "one", "r-3.html": "two",
    }  # fmt: skip
    said = [f"foveate: r.html was already in {tmp_path}; the earlier file is now r-{n}.html" for n in (2, 3)]
    assert capsys.readouterr().err.splitlines() == said


def test_files_of_one_report_get_one_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench-2.md").touch()
    write(tmp_path, "bench.json", "bench.md", text="old")
    write(tmp_path, "bench.json", "bench.md", "bench.svg", text="new")
    assert names(tmp_path) == ["bench-2.md", "bench-3.json", "bench-3.md", "bench.json", "bench.md", "bench.svg"]
    assert (tmp_path / "bench-3.json").read_text() == "old"
    assert "bench-3.json, and 1 more likewise" in capsys.readouterr().err


def test_the_number_fits_into_a_long_name(tmp_path: Path) -> None:
    name = "\u7ea2" * 83 + "x.html"
    assert len(name.encode()) == 255
    write(tmp_path, name, text="old")
    write(tmp_path, name)
    assert names(tmp_path) == sorted([name, "\u7ea2" * 82 + "-2.html"])


def test_later_batches_follow_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Staging(tmp_path / "out") as staging:
        for text in ("1", "2"):
            staging.path("log.json").write_text(text)
            staging.publish()
    assert (names(tmp_path / "out"), capsys.readouterr().err) == (["log.json"], "")
    assert (tmp_path / "out" / "log.json").read_text() == "2"


def test_a_folder_in_the_way_at_the_end_costs_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert write(tmp_path, "a.png") == {"a.png": tmp_path / "a-2.png"}
    with pytest.raises(FoveateError, match=r"cannot write .*a\.png: it is a folder"), Staging(tmp_path, ["a.png"]):
        pass
    assert names(tmp_path) == ["a-2.png", "a.png"]


@pytest.mark.parametrize("folder", ["x" * 300, "deep/" + "x" * 300, "a\0b", "file", "file/out", "link"])
def test_a_place_that_cannot_be_is_found_before_any_work(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(FoveateError, match="cannot write to .*; choose another place"), Staging(tmp_path / folder):
        pass
    with pytest.raises(FoveateError, match="cannot write"), Staging(tmp_path, [f"{'x' * 300}.png"]):
        pass
    assert names(tmp_path) == ["file", "link"]


def lose_the_place(folder: Path) -> None:
    with Staging(folder) as staging:
        staging.path("a.png").write_text("drawn")
        folder.touch()
        staging.publish()


def test_a_place_that_is_lost_at_the_end_costs_no_file(tmp_path: Path) -> None:
    with pytest.raises(FoveateError) as raised:
        lose_the_place(tmp_path / "out")
    (kept,) = tmp_path.glob("foveate-kept-*")
    assert (kept / "a.png").read_text() == "drawn"
    assert str(raised.value) == (
        f"cannot write to {tmp_path / 'out'} (File exists); the files are kept in {kept}, move them from there"
    )
    assert names(tmp_path) == [kept.name, "out"]


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Staging(tmp_path / "out") as staging:
        shutil.rmtree(tmp_path / "out")
        staging.path("a.png").touch()
        staging.publish()
    assert names(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize(("mask", "folder_mode", "file_mode"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_permissions_are_what_the_umask_leaves(tmp_path: Path, mask: int, folder_mode: int, file_mode: int) -> None:
    with umask(mask):
        write(tmp_path / "deep" / "out", "a.png")
    modes = [os.stat(tmp_path / path).st_mode & 0o777 for path in ("deep", "deep/out", "deep/out/a.png")]
    assert modes == [folder_mode, folder_mode, file_mode]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_what_stops_leaves_nothing_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        write_and_raise(tmp_path, error)
    assert names(tmp_path) == []

    remove, calls = shutil.rmtree, []

    def interrupted_once(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(*arguments, **options)

    monkeypatch.setattr("foveate.cli.staging.shutil.rmtree", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path, error)
    assert names(tmp_path) == [], "a second Ctrl-C while it cleans up"


def test_a_signal_while_the_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def make_and_stop(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", make_and_stop)
    with pytest.raises(KeyboardInterrupt), Staging(tmp_path):
        pass
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_what_is_complete_is_moved_even_if_moving_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def interrupted_once(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr("foveate.cli.staging.os.replace", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "a", "b")
    assert names(tmp_path) == ["a", "b"]


def test_generate_keeps_what_an_earlier_run_made(run: Callable[..., Any], toy_folder: Path, tmp_path: Path) -> None:
    first = run("generate", "\u7ea2" * 300, "-m", toy_folder, "--seed", 7, "-o", "out", "--preview", "--json").data
    path = tmp_path / first["images"][0]["path"]
    before = path.read_bytes()
    ran = run("generate", "\u7ea2" * 300, "-m", toy_folder, "--seed", 7, "-o", "out", "-p", "skip-scales", "--json")
    assert ran.code == 0
    other = tmp_path / ran.data["images"][0]["path"]
    assert other.name == path.name.replace(".png", "-2.png")
    assert (path.read_bytes(), other.is_file()) == (before, True)
    assert other.read_bytes() != before
    assert ran.err == f"foveate: {path.name} is already in out; the new file is {other.name}\n"


@pytest.mark.soak
def test_compare_keeps_an_earlier_report_and_what_it_measured(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff# objects\r\na red cat\r\n".encode())
    command = ("compare", "-p", "full", "--prompts", "p.txt", "--runs", 1, "-m", toy_folder, "--html", "r.html")
    (tmp_path / "r.html").write_text("earlier")
    ran = run(*command)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "r.html")
    assert ran.err == "foveate: r.html was already in .; the earlier file is now r-2.html\n"
    assert (tmp_path / "r-2.html").read_text() == "earlier"

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveate.viz.page.render", refuse)
    ran = run(*command, "--json")
    assert (ran.code, ran.data["identical"], ran.err) == (2, 1, "foveate: No space left on device\n")
