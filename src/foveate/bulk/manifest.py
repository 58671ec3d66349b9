"""Entries: what the manifest says of every image, and of every row or image that failed.

An entry is a dict of JSON values and one line of `manifest/<shard>.jsonl`; lines are ordered by row and image. What
fields there are is decided here alone: the columns of parquet files follow.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveate.core.errors import FoveateError

FieldType = Literal["int", "float", "text", "json"]

FIELDS: dict[str, FieldType] = {
    "row": "int",
    "id": "text",
    "image": "int",
    "file": "text",
    "key": "text",
    "prompt": "text",
    "negative_prompt": "text",
    "seed": "int",
    "policy": "text",
    "policy_fingerprint": "text",
    "model": "text",
    "weights_sha256": "text",
    "width": "int",
    "height": "int",
    "format": "text",
    "bytes": "int",
    "sha256": "text",
    "warnings": "json",
    "flops_run": "int",
    "flops_full": "int",
    "psnr_to_full": "float",
    "extra": "json",
}
"""Of an image, in the order in which they are written. `file`, `key`, `bytes` and `sha256` are filled in on the way."""

FAILURE_FIELDS = ("error", "attempts")
"""What a failure says beside the fields of an image that are known of it."""

_ORDER = {name: place for place, name in enumerate((*FIELDS, *FAILURE_FIELDS))}

Key = tuple[int, int | None]
"""Row and image; None stands for a row that failed as a whole."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image, or one failure.

    Attributes:
        entry: Of `FIELDS`, with `row`, `id` and `image` at least; a failure has `error` and `attempts` too.
        content: The encoded image; None for a failure.
    """

    entry: dict[str, Any]
    content: bytes | None

    def __post_init__(self) -> None:
        """Finds fields that nobody has declared, which parquet files would lose."""
        unknown = self.entry.keys() - _ORDER.keys()
        assert not unknown, f"{sorted(unknown)} must be declared in bulk/manifest.py"
        assert ("error" in self.entry) == (self.content is None), "a failure has an error and no content"


def key_of(entry: Mapping[str, Any]) -> Key:
    """What an entry is about."""
    return int(entry["row"]), entry["image"]


def order_of(key: Key) -> tuple[int, int]:
    """By row and image; a row as a whole comes first."""
    return key[0], -1 if key[1] is None else key[1]


def sample_key(row: int, image: int) -> str:
    """Name of an image in its shard, as WebDataset wants it: no dots and no slashes."""
    return f"{row:09d}-{image:02d}"


def encode_entry(entry: Mapping[str, Any]) -> bytes:
    """An entry as JSON in UTF-8 without line breaks; the same fields give the same bytes."""
    ordered = dict(sorted(entry.items(), key=lambda field: _ORDER[field[0]]))
    text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can escape and UTF-8 cannot hold.
        return json.dumps(ordered, separators=(",", ":"), allow_nan=False).encode()


def part_path(folder: Path, number: int) -> Path:
    """Where the entries of a shard are."""
    return folder / "manifest" / f"{number:08d}.jsonl"


def read_part(path: Path, *, only_failed: bool = False) -> Iterator[dict[str, Any]]:
    """The entries of a shard in order, one line in memory at a time.

    Args:
        path: `part_path` of a published shard.
        only_failed: Whether images are left out, without reading what they say.

    Raises:
        FoveateError: The file cannot be read, or a line is damaged.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # A quotation mark inside a text has a backslash before it, so this finds every failure.
                if only_failed and b'"error":' not in line:
                    continue
                entry = _parsed(line, path, number)
                if not only_failed or "error" in entry:
                    yield entry
    except OSError as error:
        raise FoveateError(f"cannot read {path}: {error.strerror or error}; restore it from a copy") from None


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        key_of(entry)
    except (ValueError, KeyError, TypeError):
        raise FoveateError(
            f"{path} line {number} is damaged; delete this file, and the same command generates its shard again"
        ) from None
    return dict(entry)
