"""Streams that are closed, full, or cannot show what is printed, prompts outside the locale, and signals."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foveate.cli import generate
from foveate.cli.arguments import for_system, prepared
from foveate.cli.console import note, print_json, print_paths, readable
from foveate.cli.main import main
from foveate.core.errors import FoveateError
from foveate.pipeline.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("on_a_machine_with_c_code")

APPLE = "\u7ea2\u82f9\u679c \U0001f34e"
ESCAPED = "\u7ea2".encode().decode("ascii", "surrogateescape")

PROGRAM = """
import os, sys
from foveate.cli.main import main
codes = [main(line.split("\\t")) for line in {lines!r}]
with open("codes", "w") as file:
    file.write(" ".join(map(str, codes)))
    assert file.fileno() > 2, "a file must not be what others take for stdout"
"""


def streams(monkeypatch: pytest.MonkeyPatch, encoding: str) -> tuple[io.BytesIO, io.BytesIO]:
    """Puts streams of an encoding in the place of both; returns what is written to them."""
    pair = (io.BytesIO(), io.BytesIO())
    for name, target in zip(("stdout", "stderr"), pair, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(target, encoding=encoding, errors="strict"))
    return pair


def in_shell(folder: Path, redirection: str, *lines: str, env: dict[str, str] | None = None) -> tuple[str, str, str]:
    """Runs commands in one process below a shell; returns their codes, stdout and stderr, without a traceback."""
    program = PROGRAM.format(lines=lines)
    command = f'exec "$0" -c "$1" {redirection}'
    ran = subprocess.run(
        ["sh", "-c", command, sys.executable, program],
        cwd=folder, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip
    out, err = ran.stdout.decode(), ran.stderr.decode()
    assert ran.returncode == 0, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return (folder / "codes").read_text(), out, err


def draw(toy_folder: Path, *more: str) -> str:
    return "\t".join(("generate", APPLE, "-m", str(toy_folder), "--seed", "7", "-p", "skip-scales:count=4", *more))


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-16"])
def test_a_stream_of_few_characters_costs_nothing(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "foveate-out/\u7ea2\u82f9\u679c-7"
    for number, more in enumerate(["--json", ""]):
        out, err = streams(monkeypatch, encoding)
        before = (sys.stdout, sys.stderr)
        assert main([*draw(toy_folder).split("\t"), *more.split()]) == 0
        assert (sys.stdout, sys.stderr) == before
        if more:
            image = json.loads(out.getvalue().decode(encoding))["images"][0]
            assert (image["path"], image["prompt"]) == (f"{path}.png", APPLE)
        elif encoding != "utf-16":
            assert os.fsdecode(out.getvalue().splitlines()[-1]) == f"{path}-2.png", "the bytes of its name, as ls does"
        assert err.getvalue().decode(encoding).count("\n") == number
    assert len(list((tmp_path / "foveate-out").iterdir())) == 2
    assert main(["generate", APPLE, "-p", "\u7ea2"]) == 2
    assert b"\\u7ea2" in err.getvalue() or encoding == "utf-16"


def test_every_list_prints_to_a_stream_of_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = streams(monkeypatch, "ascii")
    for command in ("policies", "models"):
        assert main([command]) == main([command, "--json"]) == main([command, "--help"]) == 0
    assert err.getvalue() == b""
    assert out.getvalue().isascii()


def test_streams_that_are_missing_or_closed(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = draw(toy_folder).split("\t")
    said = "foveate: stdout is closed, so the result was not printed; the files of the command are complete\n"
    for closed in (None, io.TextIOWrapper(io.BytesIO())):
        _, err = streams(monkeypatch, "utf-8")
        if closed is not None:
            closed.close()
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(line) == 0
        assert err.getvalue().decode().splitlines(keepends=True)[-1] == said
        monkeypatch.setattr(sys, "stderr", closed)
        assert main(line) == main([*line, "--json"]) == 0
        assert main(["generate"]) == 2
        assert sys.stdout is sys.stderr is closed
    assert len(list((tmp_path / "foveate-out").iterdir())) == 6
    assert capfd.readouterr() == ("", "")


class Full(io.RawIOBase):
    """Takes nothing, as a full disk does or a pipe that nobody reads."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise self.error


@pytest.mark.parametrize("is_unbuffered", [True, False])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, ["foveate: cannot print the result to stdout (No space left"]),
        (BrokenPipeError(32, "Broken pipe"), 0, []),
    ],
)
def test_a_stream_that_fails_keeps_files_and_codes(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, code: int, said: list[str],
    is_unbuffered: bool,
) -> None:  # fmt: skip
    def broken() -> io.TextIOWrapper:
        raw = Full(error)
        return io.TextIOWrapper(raw if is_unbuffered else io.BufferedWriter(raw), write_through=is_unbuffered)

    monkeypatch.chdir(tmp_path)
    picture = draw(toy_folder).split("\t")
    for arguments in (picture, ["models", "--json"], ["models", "--help"]):
        _, err = streams(monkeypatch, "utf-8")
        monkeypatch.setattr(sys, "stdout", broken())
        assert main(arguments) == code
        assert [line[:54] for line in err.getvalue().decode().splitlines()] == [line[:54] for line in said]
    monkeypatch.setattr(sys, "stderr", broken())
    assert main(picture) == code
    assert main(["polici"]) == 2
    assert len(list((tmp_path / "foveate-out").iterdir())) == 2


def test_a_bound_fails_even_if_nobody_reads(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a red cat\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full(BrokenPipeError()), write_through=True))
    prompts = ["--prompts", str(tmp_path / "p.txt"), "-m", str(toy_folder)]
    assert main(["compare", "-p", "full", "--runs", "1", "--fail-if", "n > 0", *prompts]) == 1


def test_numbers_of_closed_streams_are_not_those_of_files(toy_folder: Path, tmp_path: Path) -> None:
    lines = (draw(toy_folder), draw(toy_folder, "--json"), "generate\t--help", "polici")
    codes, out, err = in_shell(tmp_path, ">&- <&-", *lines, "compare\t-p\tfull\t--prompts\t-")
    assert (codes, out) == ("0 0 0 2 2", "")
    assert err.count("\n") == 5 + 1, "one line for each, and one for the name that is taken"
    assert "cannot read prompts from stdin: it is closed" in err
    assert in_shell(tmp_path, ">&- 2>&- <&-", lines[0], *lines[2:])[0] == "0 0 2"
    assert in_shell(tmp_path, ">/dev/full 2>/dev/full", lines[0], *lines[2:])[0] == "2 2 2"
    pictures = list((tmp_path / "foveate-out").iterdir())
    assert len(pictures) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_a_locale_that_cannot_say_the_prompt(toy_folder: Path, tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    (tmp_path / "c.yaml").write_text("output: \u7ea2\nnegative_prompt: \u82f9\n", encoding="utf-8")
    program = "import os, sys; from foveate.cli.main import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", program, *draw(toy_folder, "--config", "c.yaml", "--json").split("\t")],
        cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, b"")
    image = json.loads(ran.stdout)["images"][0]
    assert (image["path"], image["prompt"]) == ("\u7ea2/\u7ea2\u82f9\u679c-7.png", APPLE)
    assert (tmp_path / image["path"]).is_file()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["generate", "\udcff cat"], "the prompt '\\\\udcff cat' is not UTF-8"),
        (["generate", "\ud800"], "the prompt '\\\\ud800' is not UTF-8"),
        (["generate", "a", "--negative-prompt", "\udcff"], "is not UTF-8"),
        (["generate", "a\0b"], "an argument holds a NUL character: 'a\\\\x00b'; leave it out"),
        (["generate", "a", "-o", "x\0y"], "an argument holds a NUL character"),
        (["generate", "a", "--prompts", "\udcff"], "cannot read prompts from"),
        (["generate", "a", "--policy", "\udcff"], "no policy"),
        (["generate", "a", "--size", "9" * 100_000], "--size must be one of"),
        (["generate", "a", "--" + "x" * 100_000], "Unknown option"),
        (["policies", "\x1b[2J\u7ea2"], "no policy '\\\\x1b[2j\u7ea2'"),
        (["compare", "-p", "full", "--html", f"{'x' * 300}.html"], "cannot write"),
        (["compare", "-p", "full", "--html", "x" * 300 + "/r.html"], "cannot write"),
    ],
)
def test_odd_arguments_are_one_short_line(run: Callable[..., Any], arguments: list[str], part: str) -> None:
    ran = run(*arguments)
    ran.assert_refused(part.replace("\\\\", "\\"))
    assert len(ran.err) < 2100
    assert "\x1b" not in ran.err


def test_undecoded_bytes_are_read_as_utf8_in_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(generate, "_draw", lambda *arguments: seen.append(arguments) or 0)
    assert main(["generate", f"{ESCAPED} cat", "--negative-prompt", ESCAPED, "-o", f"{ESCAPED}/"]) == 0
    _, prompts, call, _, options = seen[0]
    assert (prompts, call["negative_prompt"], options.output) == (["\u7ea2 cat"], "\u7ea2", f"{ESCAPED}/")
    assert readable(f"{ESCAPED} \u7ea2 \udcff") == "\u7ea2 \u7ea2 \udcff"
    assert for_system("\u7ea2") == "\u7ea2"
    assert prepared(["--prompts", "-", "-", "--prompts=-"]) == ["--prompts=-", "-", "--prompts=-"]
    with pytest.raises(FoveateError, match="NUL"):
        prepared(["\0"])


def test_names_that_are_no_text_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = streams(monkeypatch, "utf-8")
    print_paths(["a", Path("b\udcff"), "\u7ea2"])
    print_json({"path": "b\udcff"})
    note("x\x1b[2J\r\n\x07\udcff".replace("\udcff", "y") + "z" * 9000 + " remedy")
    sys.stdout.flush()
    sys.stderr.flush()
    assert out.getvalue().splitlines()[:3] == [b"a", b"b\xff", "\u7ea2".encode()]
    assert json.loads(out.getvalue().splitlines()[3])["path"] == "b\udcff"
    line = err.getvalue().decode()
    assert line.startswith("foveate: x\\x1b[2J \\x07yzzz")
    assert line.endswith("z remedy\n")
    assert len(line) < 2100
    # Somebody else's object, such as that of a notebook, is used as it is.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["models", "--json"]) == 0
    print_paths(["b\udcff"])
    assert sys.stdout.getvalue().endswith("}\nb\udcff\n")


def test_prompts_come_from_stdin(run: Callable[..., Any], toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff# no\r\na cat\r\n\u7ea2\r\n".encode())))
    data = run("generate", "--prompts", "-", "-m", toy_folder, "-p", "skip-scales:count=4", "--json").data
    assert [image["prompt"] for image in data["images"]] == ["a cat", "\u7ea2"]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_leave_nothing_hidden_and_keep_what_is_complete(
    run: Callable[..., Any], toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    number = getattr(signal, name)
    # Whoever runs the tests may ignore hanging up, as nohup does.
    outside = signal.signal(number, signal.SIG_DFL)
    stream, batches = Pipeline.stream, []

    def stop_in_the_second(*arguments: Any, **options: Any) -> Any:
        batches.append(options)
        if len(batches) > 1:
            os.kill(os.getpid(), number)
        yield from stream(*arguments, **options)

    monkeypatch.setattr(Pipeline, "stream", stop_in_the_second)
    try:
        ran = run("generate", "a cat", "-n", 2, "--batch-size", 1, "--seed", 7, "-m", toy_folder, "-o", "out")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.splitlines()[-1] == "foveate: terminated"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-cat-7.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_signals_that_are_ignored_or_handled_stay_so(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    hup, term = signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)

    def kill(*arguments: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(generate, "_draw", kill)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
        assert run("generate", "a").code == 0
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, hup)
        signal.signal(signal.SIGTERM, term)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["policies", "full"])))
    thread.start()
    thread.join()
    assert codes == [0], "a thread cannot handle signals"
