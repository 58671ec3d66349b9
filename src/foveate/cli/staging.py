"""Files that appear complete and replace nothing: written to a hidden folder next to their place, then moved.

A name made of a prompt gets a number where a file of this name is (`red-apple-7-2.png`). A name that somebody asked for
(`apple.png`, `report.html`) or that a report always has (`bench.json`) holds the newest file, and the earlier one gets
the number. One line on stderr says so.
"""

import filecmp
import itertools
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from foveate.cli.console import note
from foveate.core.atomic import refuse_irregular
from foveate.core.errors import FoveateError

NAME_BYTES = 143
"""Longest name that every common file system takes: 255 bytes on most, 143 under eCryptfs."""

_SLUG_LENGTH, _SLUG_BYTES = 60, 90
"""The bytes leave room in `NAME_BYTES` for a seed, a number and an ending such as `-scale-07.webp`."""

_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d")
"""Names of devices on Windows, which no file can have."""

_VIRAMA = 9
"""Unicode's combining class of the marks that join a letter to the next one."""


class Staging:
    """The files of one command, on their way to a folder; `with` removes what was not published.

    Entering it already writes the hidden folder, so a place that cannot be written is found before any work is done.
    """

    def __init__(self, folder: Path | None, names: Sequence[str] = ()) -> None:
        """Stores the folder; nothing is made yet.

        Args:
            folder: Where the files go; None stands for nothing to write.
            names: Files that somebody asked for by name; entering checks that they can be written.
        """
        self.folder = folder
        self._names = tuple(names)
        self._hidden: Path | None = None
        self._wanted: dict[str, str] = {}
        """What `free_stem` gave out, and what would have been its name in an empty folder."""
        self._numbers: dict[str, int] = {}
        self._published: set[str] = set()
        self._numbered: list[tuple[str, str]] = []
        self._aside: list[tuple[str, str]] = []

    def __enter__(self) -> "Staging":
        """Makes the hidden folder.

        Raises:
            FoveateError: Nothing can be written there, or not under these names.
        """
        if self.folder is None:
            return self
        place = self.folder
        try:
            place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
            self._hidden = place / f".foveate-{secrets.token_hex(6)}"
            self._hidden.mkdir()
            self._try_names(place)
        except (OSError, ValueError) as error:
            self._remove()
            if isinstance(error, FoveateError):
                raise
            raise FoveateError(
                f"cannot write to {self.folder} ({place}: {_reason(error)}); choose another place"
            ) from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hidden folder and what is left in it, and says which names were taken."""
        self._remove()
        self._say_numbers()

    def path(self, name: str) -> Path:
        """Where to write a file that shall be called `name` in the end."""
        assert self._hidden is not None, "staging is used inside `with`"
        # Somebody may have removed the whole folder since.
        self._hidden.mkdir(parents=True, exist_ok=True)
        return self._hidden / name

    def free_stem(self, stem: str, endings: Sequence[str]) -> str:
        """Chooses the name of new files: `stem` or, if a file is there or was named so before, with -2, -3 ... behind.

        Args:
            stem: Such as `red-apple-7`.
            endings: All that shall follow, such as `.png` and `-scale-00.png`; all of these names are free.
        """
        assert self.folder is not None, "staging without a folder has nothing to name"
        first = self._numbers.get(stem, 0) + 1
        for number in itertools.count(first):
            chosen = stem if number == 1 else f"{stem}-{number}"
            names = [chosen + ending for ending in endings]
            there = [n for n in names if n in self._wanted or n in self._published or _is_there(self.folder / n)]
            if not there:
                break
        self._numbers[stem] = number
        # Inside one command, names that repeat are expected and numbered without a word.
        is_taken = any(_is_there(self.folder / (stem + e)) and stem + e not in self._published for e in endings)
        self._wanted |= {chosen + e: stem + e if is_taken else chosen + e for e in endings}
        return chosen

    def publish(self) -> dict[str, Path]:
        """Moves all files to their place; may be called again for later files.

        Returns:
            Where each file is, by the name that `path` was given.

        Raises:
            FoveateError: The place cannot be written any more. The files are kept, and the message says where.
        """
        assert self._hidden is not None, "staging is used inside `with`"
        assert self.folder is not None, "staging without a folder has nothing to publish"
        places: dict[str, Path] = {}
        try:
            try:
                self._move_all(self._hidden, self.folder, places)
            except KeyboardInterrupt:
                # What is complete stays.
                self._move_all(self._hidden, self.folder, places)
                raise
        except OSError as error:
            kept = self._keep()
            raise FoveateError(
                f"cannot write to {self.folder} ({_reason(error)}); the files are kept in {kept}, move them from there"
            ) from None
        return places

    def _move_all(self, hidden: Path, folder: Path, places: dict[str, Path]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        staged = sorted(hidden.iterdir()) if hidden.exists() else []
        self._move_aside(folder, [file for file in staged if file.name not in self._wanted])
        for file in staged:
            name = file.name
            is_irregular = (folder / name).exists() and not (folder / name).is_file()
            if name in self._wanted or is_irregular:
                places[name] = _move_beside(file, folder / name)
            else:
                os.replace(file, folder / name)
                places[name] = folder / name
            wanted = self._wanted.get(name, name)
            if places[name].name != wanted:
                self._numbered.append((wanted, places[name].name))
            self._published.add(places[name].name)

    def _move_aside(self, folder: Path, files: Sequence[Path]) -> None:
        """Gives the earlier files of the same names a number, one for all of them: they belong together."""
        earlier = [file.name for file in files if _is_other(file, folder / file.name)]
        earlier = [name for name in earlier if name not in self._published]
        if not earlier:
            return
        number = next(n for n in itertools.count(2) if not any(_is_there(folder / _with(f.name, n)) for f in files))
        for name in earlier:
            aside = _with(name, number)
            os.rename(folder / name, folder / aside)
            self._aside.append((name, aside))

    def _try_names(self, place: Path) -> None:
        """Makes every folder and file once that the end of the command needs."""
        assert self.folder is not None
        assert self._hidden is not None
        if _is_there(self.folder) and not self.folder.is_dir():
            raise FoveateError(f"cannot write to {self.folder}: it is not a folder; choose another place")
        for part in self.folder.absolute().parts[len(place.absolute().parts) :]:
            if part != "..":
                (self._hidden / part).mkdir()
                (self._hidden / part).rmdir()
        for name in self._names:
            refuse_irregular(self.folder / name)
            (self._hidden / name).touch()
            (self._hidden / name).unlink()

    def _keep(self) -> Path:
        """Renames the hidden folder to a visible one."""
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        kept = hidden.with_name(hidden.name.replace(".foveate-", "foveate-kept-"))
        try:
            return hidden.rename(kept)
        except OSError:
            return hidden

    def _remove(self) -> None:
        if self._hidden is None:
            return
        try:
            shutil.rmtree(self._hidden, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(self._hidden, ignore_errors=True)
            raise
        self._hidden = None

    def _say_numbers(self) -> None:
        if self._numbered:
            wanted, got = min(self._numbered, key=lambda pair: len(pair[0]))
            more = f", and {len(self._numbered) - 1} more" if self._numbered[1:] else ""
            note(f"{wanted} is already in {self.folder}; the new file is {got}{more}")
        if self._aside:
            name, aside = self._aside[0]
            more = f", and {len(self._aside) - 1} more likewise" if self._aside[1:] else ""
            note(f"{name} was already in {self.folder}; the earlier file is now {aside}{more}")


def slug(prompt: str) -> str:
    """The words of a prompt as a file name, at most 60 characters and 90 bytes; letters of any script stay.

    No character is cut from its marks, no device of Windows is named, and the file system can encode the name.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", prompt).casefold())
    words = _cut("-".join(_words(plain)), _SLUG_LENGTH, _SLUG_BYTES).strip("-_") or "image"
    if _RESERVED.fullmatch(words):
        words = f"{words}-image"
    try:
        os.fsencode(words)
    except UnicodeEncodeError:
        # The name in UTF-8, whatever the locale says that names are.
        return os.fsdecode(words.encode())
    return words


def _words(text: str) -> Iterator[str]:
    """Runs of letters and digits with the marks on them; joiners between letters are left out."""
    word = ""
    for char in text:
        if char.isalnum() or char == "_" or (word and _is_mark(char)):
            word += char
        elif unicodedata.category(char) != "Cf" and word:
            yield word
            word = ""
    if word:
        yield word


def _is_mark(char: str) -> bool:
    """Whether a character belongs to the letter before it; those that only choose a glyph do not count."""
    is_selector = "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef"
    return unicodedata.category(char) in ("Mn", "Mc") and not is_selector


def _cut(text: str, length: int, num_bytes: int) -> str:
    """The beginning of a text within both limits, whole graphemes only."""
    kept = ""
    for cluster in _clusters(text):
        if len(kept) + len(cluster) > length or len((kept + cluster).encode(errors="surrogatepass")) > num_bytes:
            break
        kept += cluster
    return kept


def _clusters(text: str) -> Iterator[str]:
    """Graphemes: a letter, its marks, letters that a virama joins to it, and the later parts of a Hangul syllable."""
    cluster = ""
    for char in text:
        is_joined = bool(cluster) and unicodedata.combining(cluster[-1]) == _VIRAMA and char.isalpha()
        is_jamo = "\u1160" <= char <= "\u11ff" or "\ud7b0" <= char <= "\ud7ff"
        if cluster and not (is_joined or is_jamo or _is_mark(char)):
            yield cluster
            cluster = ""
        cluster += char
    if cluster:
        yield cluster


def _is_there(path: Path) -> bool:
    """Whether anything has this name, a link to nothing included."""
    return os.path.lexists(path)


def _is_other(file: Path, target: Path) -> bool:
    """Whether a file is at `target` whose bytes are not those of `file`."""
    return target.is_symlink() or (target.is_file() and not filecmp.cmp(file, target, shallow=False))


def _with(name: str, number: int) -> str:
    """A file name with a number in front of its ending, no longer than a file system takes."""
    stem, suffix = os.path.splitext(name)
    ending = f"-{number}{suffix}"
    limit = max(len(os.fsencode(name)), NAME_BYTES) - len(os.fsencode(ending))
    return (_cut(stem, len(stem), limit) or "file") + ending


def _move_beside(file: Path, target: Path) -> Path:
    """Moves a file to `target` or, where something is, to the next free number; nothing is replaced."""
    for number in itertools.count(1):
        place = target if number == 1 else target.with_name(_with(target.name, number))
        try:
            os.link(file, place)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links; between the look and the move another process may be quicker.
            if _is_there(place):
                continue
            os.rename(file, place)
            return place
        file.unlink()
        return place
    raise AssertionError("there is always another number")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
