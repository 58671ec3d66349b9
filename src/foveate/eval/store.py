"""What a comparison measured, in a folder: an interrupted run loses nothing and goes on where it stopped.

`config.json` says what was measured and how; a run with other settings is refused. `records.jsonl` has a line for every
call and for the scores of every batch, in the order in which they were made. `images/` has the images and what ran for
them. One process at a time writes.

Axes: Y pixel rows, X columns.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import UInt8
from PIL import Image

from foveate.core.atomic import replace_file, write_text
from foveate.core.errors import FoveateError
from foveate.core.setting_changes import setting_changes
from foveate.eval.pairs import PairScores
from foveate.viz.scale_map import ScaleMap

FORMAT = 1
_CONFIG, _RECORDS, _LOCK = "config.json", "records.jsonl", "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of the pipeline: a batch with one policy, timed.

    Attributes:
        side: Key of the policy and its seeds.
        batch: Index of the batch of prompts.
        run: Which of the timed rounds over this batch; all policies take turns in it.
        session: Of one process, whose calls took turns; times of two sessions are not compared.
        ms: Of text encoder, transformer, decoder and the whole call.
        scale_ms: Of every scale, 0 where it did not run.
        grids: Of every scale.
        flops_run: Counted while it ran.
        flops_full: Of the same batch in full.
    """

    side: str
    batch: int
    run: int
    session: str
    ms: dict[str, float]
    scale_ms: tuple[float, ...]
    grids: tuple[tuple[int, int], ...]
    flops_run: int
    flops_full: int


class Store:
    """Records of a comparison, in memory and in a folder; made by `open_store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: dict[tuple[str, int], list[Call]] = {}
        """By side and batch, in the order in which they ran."""
        self.scores: dict[tuple[str, int], tuple[PairScores, ...]] = {}
        """By side and batch."""
        for record in _read_records(folder / _RECORDS):
            self._take(record)

    def add_call(self, call: Call) -> None:
        """Keeps a call."""
        self._append({"call": asdict(call)})

    def add_scores(self, side: str, batch: int, scores: Sequence[PairScores]) -> None:
        """Keeps the scores of a batch's images."""
        self._append({"scores": [asdict(pair) for pair in scores], "side": side, "batch": batch})

    def add_image(self, side: str, index: int, picture: UInt8[np.ndarray, "Y X 3"], maps: Sequence[ScaleMap]) -> None:
        """Keeps an image and what ran for it, if that is known."""
        path = self._image(side, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            Image.fromarray(picture).save(partial, format="PNG")
        if maps:
            with replace_file(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
                np.savez_compressed(file, **_arrays(maps))

    def image(self, side: str, index: int) -> UInt8[np.ndarray, "Y X 3"]:
        """An image that was kept.

        Raises:
            FoveateError: It is gone.
        """
        path = self._image(side, index)
        try:
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise FoveateError(
                f"cannot read {path} of the store: {error.strerror or error}; take another store"
            ) from None

    def maps(self, side: str, index: int) -> tuple[ScaleMap, ...]:
        """What ran for an image, scale by scale; nothing where it was not kept."""
        path = self._image(side, index).with_suffix(".npz")
        if not path.is_file():
            return ()
        with np.load(path) as arrays:
            return _maps(arrays)

    def _image(self, side: str, index: int) -> Path:
        return self.folder / "images" / side / f"{index:05d}.png"

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")) + "\n"
        with (self.folder / _RECORDS).open("a", encoding="utf-8") as file:
            file.write(text)
        self._take(json.loads(text))

    def _take(self, record: Mapping[str, Any]) -> None:
        if "call" in record:
            values = record["call"]
            call = Call(**values | {"scale_ms": tuple(values["scale_ms"]), "grids": tuple(map(tuple, values["grids"]))})
            self.calls.setdefault((call.side, call.batch), []).append(call)
        else:
            pairs = tuple(PairScores(**values) for values in record["scores"])
            self.scores[(record["side"], record["batch"])] = pairs


@contextmanager
def open_store(folder: Path, config: Mapping[str, Any]) -> Iterator[Store]:
    """A store that only this process writes; it is made where there is none.

    Args:
        folder: A store of the same settings, or a name that is free.
        config: Everything that decides what is measured, as plain data.

    Raises:
        FoveateError: The folder has something else, other settings, or another process that writes to it.
    """
    check_store(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FoveateError(f"{folder} is in use by another process; wait for it, or take another store") from None
    try:
        if not (folder / _CONFIG).is_file():
            write_text(folder / _CONFIG, json.dumps({"format": FORMAT, **config}, indent=1, ensure_ascii=False) + "\n")
        yield Store(folder)
    finally:
        lock.release()


def check_store(folder: Path, config: Mapping[str, Any], *, is_partial: bool = False) -> None:
    """Refuses a folder that cannot go on with these settings.

    Args:
        folder: A store, or a name that is free.
        config: The settings.
        is_partial: Whether more settings will be known later, so that those that only the store has are not compared.

    Raises:
        FoveateError: It is something else, or was measured with other settings; the message says which.
    """
    if not folder.exists() or (folder.is_dir() and not [p for p in folder.iterdir() if p.name != _LOCK]):
        return
    path = folder / _CONFIG
    if not path.is_file():
        raise FoveateError(f"{folder} is there and is no store; take a name that is free")
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FoveateError(f"cannot read {path}: {error}; take another store") from None
    now = json.loads(json.dumps({"format": FORMAT, **config}))
    changes = setting_changes(there, now, is_partial=is_partial)
    if changes:
        raise FoveateError(
            f"{folder} was measured with other settings: {changes}. Take another store, or the same settings"
        )


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that an interruption cut is taken off it."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, newline, rest = text.rpartition("\n")
    if rest:
        write_text(path, whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def _arrays(maps: Sequence[ScaleMap]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "facts": np.array(
            [(m.scale, *m.grid, m.num_blocks, m.num_guided) for m in maps],
            dtype=np.float64,
        )
    }
    return found | {f"depth_{m.scale}": m.depth_hw for m in maps if m.depth_hw is not None}


def _maps(arrays: Mapping[str, np.ndarray]) -> tuple[ScaleMap, ...]:
    return tuple(
        ScaleMap(
            scale=int(scale),
            grid=(int(rows), int(columns)),
            num_blocks=int(blocks),
            depth_hw=arrays.get(f"depth_{int(scale)}"),
            num_guided=int(guided),
        )
        for scale, rows, columns, blocks, guided in arrays["facts"].tolist()
    )
