"""Text and prompt files as editors write them."""

import codecs
import io
import sys
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.core.prompt_file import read_prompt_file
from foveate.core.text_file import decode_text, read_text

TEXT = "caf\u00e9\n\u7ea2\u82f9\u679c\n"


class Closed(io.RawIOBase):
    """A stdin that cannot be read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise OSError(9, "Bad file descriptor")


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(codec: str) -> None:
    assert decode_text(TEXT.encode(codec), "x") == TEXT
    assert decode_text("".encode(codec), "x") == ""


def test_marks_of_big_endian_files_are_known() -> None:
    assert decode_text(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "x") == TEXT
    assert decode_text(codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "x") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"a\nb\ncaf\xe9 au lait\n",
            "cannot read prompts from p: line 3 is not UTF-8 \\(byte 0xe9\\); save it as UTF-8",
        ),
        (codecs.BOM_UTF8 + b"a\r\n\r\n\xff", "line 3 is not UTF-8 \\(byte 0xff\\)"),
        (b"\xe9\rb", "line 1 is not UTF-8"),
        (codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"x", "line 2 is not UTF-16"),
    ],
)
def test_bytes_that_are_no_text_are_named_with_their_line(data: bytes, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        decode_text(data, "prompts from p")


def test_what_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(FoveateError, match="cannot read the file "):
            read_text(path, "the file")


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_comments_and_blank_lines(tmp_path: Path, codec: str, end: str) -> None:
    lines = [
        "# a comment", "  a red cat ", "", "\t# another", r"\# a tag", r"\\# two", r"\ an owl", "a # b",
        "caf\u00e9\u2028x", "\ufeffjoined", "\ufeff# too",
    ]  # fmt: skip
    (tmp_path / "p.txt").write_bytes(end.join(lines).encode(codec))
    expected = ["a red cat", "# a tag", r"\# two", r"\ an owl", "a # b", "caf\u00e9\u2028x", "joined"]
    assert read_prompt_file(tmp_path / "p.txt") == expected
    assert read_prompt_file(str(tmp_path / "p.txt")) == expected


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"# only\n#comments", codecs.BOM_UTF8])
def test_a_file_without_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(FoveateError, match="p.txt has no prompts; write one a line"):
        read_prompt_file(tmp_path / "p.txt")
    pipe_in(monkeypatch, data)
    with pytest.raises(FoveateError, match="stdin has no prompts"):
        read_prompt_file(Path("-"))


def test_prompts_without_a_mark_in_two_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\ncat".encode("utf-16-le"))
    with pytest.raises(FoveateError, match="line 1 holds a NUL; save it as text in UTF-8"):
        read_prompt_file(tmp_path / "p.txt")


def test_prompts_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, codecs.BOM_UTF8 + "\u7ea2\r\n# no\r\na cat".encode())
    assert read_prompt_file(Path("-")) == ["\u7ea2", "a cat"]
    pipe_in(monkeypatch, b"a\n\xff")
    with pytest.raises(FoveateError, match="cannot read prompts from stdin: line 2 is not UTF-8"):
        read_prompt_file("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Closed())))
    with pytest.raises(FoveateError, match="cannot read prompts from stdin: Bad file descriptor"):
        read_prompt_file("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FoveateError, match="cannot read prompts from stdin: it is closed"):
        read_prompt_file("-")
