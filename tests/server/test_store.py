"""The store of finished images: its bounds, its end, and a disk that is full."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.core.errors import FoveateError
from foveate.server.store import ImageStore, StoreFullError, StoreSettings
from tests.server.conftest import Live
from tests.server.test_keys import Clock


def store(tmp_path: Path, clock: Clock | None = None, **settings: float) -> ImageStore:
    return ImageStore(StoreSettings(folder=tmp_path, **settings), clock or Clock())


def test_files_are_kept_for_their_owner(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.put("a", "x", b"one", "image/png")
    kept.put("b", "x", b"two", "image/webp")
    assert kept.get("a", "x") == (b"one", "image/png")
    assert kept.get("b", "x") == (b"two", "image/webp")
    assert kept.get("a", "y") is None
    assert not kept.put("a", "x", b"three", "image/png")
    assert (kept.get("a", "x"), kept.held) == ((b"one", "image/png"), (2, 6))
    assert kept.put("a", "y", b"three", "image/png")
    assert (kept.holds("a", "y"), kept.holds("b", "y")) == (True, False)
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_it_is_bounded_in_number_bytes_and_time(tmp_path: Path) -> None:
    clock = Clock()
    kept = store(tmp_path, clock, images=3, bytes=10, seconds=60.0)
    for name in "abcd":
        kept.put("o", name, b"xx", "image/png")
    assert [name for name in "abcd" if kept.get("o", name)] == ["b", "c", "d"]
    kept.put("o", "e", b"x" * 7, "image/png")
    assert [name for name in "abcde" if kept.get("o", name)] == ["d", "e"]
    with pytest.raises(StoreFullError, match="11 bytes"):
        kept.put("o", "f", b"x" * 11, "image/png")
    clock.now += 61
    assert kept.get("o", "e") is None
    kept.put("o", "g", b"x", "image/png")
    clock.now += 61
    kept.expire()
    assert kept.held == (0, 0)
    (folder,) = tmp_path.iterdir()
    assert list(folder.iterdir()) == []


def test_a_full_disk_pushes_out_the_oldest_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = store(tmp_path)
    for name in "ab":
        kept.put("o", name, b"x", "image/png")
    real, free = Path.write_bytes, [1, 0]

    def write(path: Path, content: bytes) -> int:
        if not free or not free.pop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    kept.put("o", "c", b"x", "image/png")
    assert [name for name in "abc" if kept.get("o", name)] == ["b", "c"]
    with pytest.raises(StoreFullError, match="No space left on device; ask for b64_json"):
        kept.put("o", "d", b"x", "image/png")
    monkeypatch.undo()
    kept.put("o", "e", b"x", "image/png")
    assert kept.get("o", "e") is not None


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "inside"):
        with pytest.raises(FoveateError, match="cannot keep images in"):
            store(folder)


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "images"
    kept = store(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    kept.put("a", "x", b"one", "image/png")
    kept.close()
    assert list(folder.iterdir()) == []


HOLDER = """
import sys
from pathlib import Path
from foveate.server.store_folder import StoreFolder

folder = StoreFolder(Path(sys.argv[1]))
(folder.path / "image").write_bytes(b"x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_server_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("foveate-store", "foveate-images-old", "elsewhere")]
    for other in others:
        other.mkdir()
    (tmp_path / "foveate-store-link").symlink_to(others[-1])
    (others[-1] / "file").touch()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        store(tmp_path).close()
        assert (left / "image").exists(), "its process lives"
        holder.kill()
    assert left.exists()
    kept = store(tmp_path)
    assert not left.exists()
    kept.close()
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "foveate-store-link"])
    assert (others[-1] / "file").exists()


def test_a_client_hears_of_a_full_disk(start, monkeypatch: pytest.MonkeyPatch) -> None:
    live: Live = start()

    def write(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    error = live.refused(507, response_format="url")
    assert (error["code"], error["param"]) == ("store_full", "response_format")
    assert "No space left" in error["message"]
    assert str(live.service.store._folder) not in error["message"]
    assert live.generate().status == 200


def test_urls_of_an_answer_are_all_there(start) -> None:
    live: Live = start(store=StoreSettings(images=2))
    error = live.refused(n=3, response_format="url")
    assert (error["param"], "n must be 1 to 2" in error["message"]) == ("n", True)
    urls = [image["url"] for image in live.generate(n=2, response_format="url").data["data"]]
    assert [live.send(url.removeprefix(live.url)).status for url in urls] == [200, 200]
    small: Live = start(store=StoreSettings(bytes=len(live.send(urls[0].removeprefix(live.url)).body) + 100))
    assert small.refused(507, n=2, response_format="url")["code"] == "store_full"


def test_an_id_of_a_client_is_no_url(start) -> None:
    live: Live = start()
    own = {"X-Request-ID": "0b8f6c3e-9d1a-4a57-8f5e-2f6d1c7b9a10"}
    body = {"prompt": "a cat", "response_format": "url"}
    first, second = (live.send(body=body, headers=own).data["data"][0]["url"] for _ in range(2))
    assert first != second
    assert own["X-Request-ID"] not in first
    assert live.send(f"/v1/images/{own['X-Request-ID']}").status == 404


@pytest.mark.soak
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("needs the right to mount")
    try:
        kept = store(tmp_path)
        for name in range(8):
            kept.put("o", str(name), b"x" * 16_000, "image/png")
        assert kept.get("o", "7") == (b"x" * 16_000, "image/png")
        assert kept.held[0] < 5
        with pytest.raises(StoreFullError, match="No space left"):
            kept.put("o", "large", b"x" * 100_000, "image/png")
        kept.put("o", "after", b"x" * 1000, "image/png")
        assert kept.get("o", "after") is not None
    finally:
        subprocess.run(["umount", tmp_path], check=True)
