"""The folder of a bulk run: its configuration, published shards with their entries, and hidden journals.

    run.json                    what the images depend on; another configuration is refused
    shard-00000012.tar          images (.parquet where asked for); there whole or not at all
    manifest/00000012.jsonl     entries of a shard, the last of it to appear: a shard is done when this file is there
    failed.jsonl                failures of all published shards; not there where nothing failed
    .work/                      journals of shards that are not done, and locks

Any number of processes write at once, on one machine or on a shared file system with `flock`. A shard whose rows all
failed has entries and no file of images.
"""

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

from foveate.bulk.locks import held, saying_what_is_kept
from foveate.bulk.manifest import Item, encode_entry, part_path, read_part
from foveate.bulk.shard import Shard, Summary, remove, summary_of
from foveate.bulk.shards import Images, container
from foveate.core.atomic import move_durably, sync_folder
from foveate.core.errors import FoveateError
from foveate.core.setting_changes import setting_changes

__all__ = ["Item", "OutputFolder", "Shard", "Summary"]

FORMAT = 1
CONFIG, FAILED, WORK, MANIFEST = "run.json", "failed.jsonl", ".work", "manifest"

_NOT_OURS = {WORK, "lost+found"}
"""What a folder may have before a run is in it: of another job that makes it at this moment, and a disk's own."""

_OPEN = 4
"""Published shards whose contents are remembered."""

_PATIENCE_S = 60.0
"""How long the configuration may be in use by another process."""

_TURN_S = 3600.0
"""How long what reads all entries waits for other jobs that do the same: hours of work must not fail there."""


class OutputFolder:
    """A run on disk; made by `create` and `read`. Holds no open file, so it can be pickled and sent to workers.

    Attributes:
        path: The folder.
        config: What `run.json` says.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Takes a folder that is there.

        Raises:
            FoveateError: It is of a format that this version does not know.
        """
        if config.get("format") != FORMAT:
            raise FoveateError(
                f"{path} was written in format {config.get('format')!r}, this version knows {FORMAT}; take the version "
                "that wrote it, or another folder"
            )
        self.path, self.config = path, dict(config)
        output = self.config.get("output")
        self._container = container(output.get("container") if isinstance(output, dict) else None)
        self._images: OrderedDict[str, Images] = OrderedDict()

    def __reduce__(self) -> tuple[type["OutputFolder"], tuple[Path, dict[str, Any]]]:
        return OutputFolder, (self.path, self.config)

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "OutputFolder":
        """Makes a folder, or goes on with one of the same configuration; several processes may do so at once.

        Args:
            path: A name that is free, an empty folder, or a run.
            config: Everything that images depend on, as plain data; `format` is added. `config["output"]["container"]`
                is one of `foveate.bulk.shards.CONTAINERS`.

        Raises:
            FoveateError: The folder holds something else or another configuration, or cannot be written.
        """
        now = json.loads(json.dumps({"format": FORMAT, **config}))
        found = cls(path, now)
        found._container.check()
        _refuse_others(path)
        with saying_what_is_kept(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / WORK).mkdir(exist_ok=True)
            with found._held("run", _PATIENCE_S):
                if not (path / CONFIG).is_file():
                    found._write(CONFIG, [json.dumps(now, indent=1, ensure_ascii=True).encode() + b"\n"])
                    sync_folder(path.parent)
            (path / MANIFEST).mkdir(exist_ok=True)
            sync_folder(path)
        _refuse_changes(path, now)
        found._sweep()
        return found

    @classmethod
    def peek(cls, path: Path, config: Mapping[str, Any]) -> "OutputFolder | None":
        """What `create` would go on with, or None where it would begin; nothing is written.

        Raises:
            FoveateError: What `create` would refuse.
        """
        now = json.loads(json.dumps({"format": FORMAT, **config}))
        cls(path, now)._container.check()
        _refuse_others(path)
        if not (path / CONFIG).is_file():
            return None
        _refuse_changes(path, now)
        return cls(path, now)

    @classmethod
    def read(cls, path: Path) -> "OutputFolder":
        """A finished or running run, to read; nothing is written.

        Raises:
            FoveateError: There is none.
        """
        if not (path / CONFIG).is_file():
            raise FoveateError(f"{path} has no {CONFIG}, so it is no output of `foveate batch`; name its folder")
        return cls(path, _read_config(path))

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Keeps other processes from work of the same name.

        Args:
            name: Of file names, such as `job-2-of-8`.

        Raises:
            FoveateError: Another process has it.
        """
        return self._held(f"work-{name}", 0.0)

    def turn(self, name: str) -> AbstractContextManager[None]:
        """Waits until no other process does work of the same name.

        Raises:
            FoveateError: One does it for an hour.
        """
        return self._held(name, _TURN_S)

    def published(self) -> set[int]:
        """Numbers of the shards that are done.

        Raises:
            FoveateError: The folder cannot be read.
        """
        try:
            names = [path.name for path in (self.path / MANIFEST).iterdir()]
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise FoveateError(f"cannot read {self.path}: {error.strerror}; name a folder that can be read") from None
        return {int(found[1]) for name in names if (found := re.fullmatch(r"(\d{8,})\.jsonl", name))}

    def shard(self, number: int) -> Shard:
        """A shard to go on with; `with` reads what is done of it."""
        return Shard(self.path, number, self._container)

    def num_failed(self) -> int:
        """Failures of published shards.

        Raises:
            FoveateError: They cannot be read.
        """
        return sum(1 for number in self.published() for _ in read_part(part_path(self.path, number), only_failed=True))

    def reopen_failed(self, numbers: Iterable[int]) -> int:
        """Takes published shards with failures back, so that they are gone on with; their images stay done.

        Returns:
            How many there were.

        Raises:
            FoveateError: They cannot be read or written; a shard is published or taken back, nothing in between.
        """
        count = 0
        for number in numbers:
            path = part_path(self.path, number)
            if path.is_file() and next(read_part(path, only_failed=True), None) is not None:
                with self.shard(number) as shard:
                    shard.take_back(read_part(path), self.content)
                count += 1
        return count

    def summary(self, number: int) -> Summary:
        """What is in a published shard.

        Raises:
            FoveateError: Its entries cannot be read.
        """
        return summary_of(self.path, number)

    def entries(self, shards: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """Entries of published shards by row and image, images and failures; one is in memory at a time.

        Args:
            shards: Which of them; None takes all, in order.

        Raises:
            FoveateError: They cannot be read.
        """
        for number in sorted(self.published()) if shards is None else shards:
            yield from read_part(part_path(self.path, number))

    def content(self, entry: Mapping[str, Any]) -> bytes:
        """The encoded image of an entry; fast in the order of `entries`. Not for several threads at once.

        Raises:
            FoveateError: It is gone, or its bytes are not what the entry says.
        """
        name = Path(entry["file"]).name
        if name not in self._images:
            self._images[name] = self._container.images(self.path / name)
            if len(self._images) > _OPEN:
                self._images.popitem(last=False)
        self._images.move_to_end(name)
        content = self._images[name].content(entry["key"])
        if content is None or sha256(content).hexdigest() != entry["sha256"]:
            what = "has no image" if content is None else "has a damaged image"
            raise FoveateError(f"{self.path / name} {what} {entry['key']}; restore it from a copy")
        return content

    def write_failed(self) -> int:
        """Writes all failures of published shards to `failed.jsonl`; without any the file is not there.

        Returns:
            How many there are.

        Raises:
            FoveateError: It cannot be written.
        """
        count = 0

        def lines() -> Iterator[bytes]:
            nonlocal count
            for number in sorted(self.published()):
                for entry in read_part(part_path(self.path, number), only_failed=True):
                    count += 1
                    yield encode_entry(entry) + b"\n"

        with saying_what_is_kept(self.path), self.turn("failed"):
            self._write(FAILED, lines())
            if count == 0:
                (self.path / FAILED).unlink()
        return count

    def _held(self, name: str, patience_s: float) -> AbstractContextManager[None]:
        busy = f"{self.path} is in use by another process ({name.removeprefix('work-')}); wait for it, or end it"
        return held(self.path / WORK / f"{name}.lock", patience_s, busy)

    def _write(self, name: str, lines: Iterable[bytes]) -> None:
        """Writes a file of the folder; only for the process that has its lock."""
        for left in (self.path / WORK).glob(f"{name}.*.part"):
            remove(left)
        partial = self.path / WORK / f"{name}.{secrets.token_hex(8)}.part"
        try:
            with partial.open("xb") as file:
                file.writelines(lines)
            move_durably(partial, self.path / name)
        finally:
            partial.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what a process that was killed left of shards that are done."""
        published = self.published()
        with saying_what_is_kept(self.path):
            for path in (self.path / WORK).iterdir():
                number = path.name.partition(".")[0]
                if number.isdecimal() and int(number) in published:
                    remove(path)


def _refuse_changes(path: Path, now: Mapping[str, Any]) -> None:
    """Refuses a folder of another configuration, with the differences."""
    if changes := setting_changes(_read_config(path), now):
        raise FoveateError(f"{path} was made with other settings: {changes}. Take another folder, or the same settings")


def _refuse_others(path: Path) -> None:
    """Refuses a folder that holds something else."""
    if path.exists() and not path.is_dir():
        raise FoveateError(f"{path} is there and is no folder; take a name that is free")
    with saying_what_is_kept(path):
        has_others = path.exists() and {p.name for p in path.iterdir()} - _NOT_OURS
        # Looked for last: another job may make this very folder meanwhile.
        if has_others and not (path / CONFIG).exists():
            raise FoveateError(f"{path} is there and is no output of `foveate batch`; take a name that is free")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"cannot read {path / CONFIG}: {error}; restore it from a copy") from None
    if not isinstance(config, dict):
        raise FoveateError(f"{path / CONFIG} is damaged; restore it from a copy")
    return config
