"""Items that tests of bulk generation write, and the state of a folder."""

import hashlib
from pathlib import Path
from typing import Any

from foveate.bulk.manifest import Item
from foveate.bulk.output import OutputFolder

CONFIG: dict[str, Any] = {"output": {"container": "tar", "format": "png"}, "seed": 7, "shard_size": 4}


def content_of(row: int, image: int = 0, size: int = 40) -> bytes:
    """Bytes that stand for an image; every one has others."""
    return hashlib.shake_256(b"%d-%d" % (row, image)).digest(size)


def an_item(row: int, image: int = 0, content: bytes | None = None, **entry: Any) -> Item:
    """An image that is done."""
    said = {"row": row, "id": f"a{row}", "image": image, "prompt": f"prompt {row}", "seed": row, "format": "png"}
    return Item({**said, "flops_run": 2, "flops_full": 3, **entry}, content or content_of(row, image))


def a_failure(row: int, image: int | None = None, attempts: int = 1, error: str = "no numbers") -> Item:
    """A row or an image that failed."""
    return Item({"row": row, "id": f"a{row}", "image": image, "error": error, "attempts": attempts}, None)


def a_run(path: Path, container: str = "tar") -> OutputFolder:
    """A folder that goes on where there is one."""
    return OutputFolder.create(path, {**CONFIG, "output": {"container": container, "format": "png"}})


def visible(folder: Path) -> dict[str, bytes]:
    """All files but hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def hidden(folder: Path, ending: str = "") -> list[str]:
    """Names of hidden files that belong to shards."""
    return sorted(path.name for path in (folder / ".work").iterdir() if path.name.endswith(ending))
