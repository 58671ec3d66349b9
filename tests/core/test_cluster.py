"""What can be said of a Ray cluster before Ray starts: nothing here needs it."""

import os
import socket
import time
from pathlib import Path

import pytest

from foveate.core import cluster
from foveate.core.errors import FoveateError


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        cluster._reach(f"127.0.0.1:{port}")
        cluster._reach(f"ray://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(FoveateError, match=f"there is no Ray cluster at 127.0.0.1:{port}: .*refused; start one"):
        cluster._reach(f"127.0.0.1:{port}")
    with pytest.raises(FoveateError, match="there is no Ray cluster at 127.0.0.1:123456"):
        cluster._reach("127.0.0.1:123456")
    assert time.monotonic() - began < 2
    cluster._reach("auto")


def test_what_ray_writes_is_readable_to_its_user_alone_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with cluster._own_folder() as name:
        given = Path(name)
        given.mkdir()
        # As Ray does.
        given.chmod(0o777)
        assert given.parent.parent == tmp_path
        assert given.parent.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    with pytest.raises(FoveateError, match="Ray needs a folder in .*none: .*set RAY_TMPDIR"), cluster._own_folder():
        pass


def test_a_cluster_has_a_token_of_its_own_unless_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster._TOKENS:
        monkeypatch.delenv(name, raising=False)
    with cluster._own_token():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/mine")
    with cluster._own_token():
        assert "RAY_AUTH_TOKEN" not in os.environ


def test_machines_without_statvfs_have_shared_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "statvfs")
    assert cluster._object_bytes() > 80 << 20
