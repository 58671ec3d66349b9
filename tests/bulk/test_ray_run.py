"""`foveate batch --engine ray`: two workers, one killed in the middle, and the same bytes as one process makes."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from foveate.bulk.output import OutputFolder

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")

TIMEOUT_S = 240.0


def command(rows: Path, out: Path, model: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "foveate", "batch", str(rows), "-o", str(out), "-m", str(model), "--shard-size", "4",
        "-p", "skip-scales:count=3", "--threads", "1", "--batch-size", "2", "--json", *more,
    ]  # fmt: skip


def workers_of(parent: int) -> list[int]:
    """Processes of Ray's actors that generate, below a process."""
    found, parents = [], {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(stat[1])
            if b"MapWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue

    def is_below(pid: int) -> bool:
        while pid > 1:
            if pid == parent:
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid in found if is_below(pid)]


@pytest.mark.soak
def test_a_killed_worker_costs_no_image(toy_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    prompts = [f"a {color} cat {i}" for i in range(16) for color in ("red", "green", "blue")]
    rows.write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in [*prompts, "one too many\0"]))
    with subprocess.Popen(
        command(rows, tmp_path / "ray", toy_folder, "--engine", "ray", "--num-workers", "2"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            until, killed = time.monotonic() + TIMEOUT_S, None
            while killed is None and process.poll() is None:
                assert time.monotonic() < until
                # The first journal says that a worker is in the middle of a shard.
                if any((tmp_path / "ray" / ".work").glob("*.journal")) and (workers := workers_of(process.pid)):
                    killed = workers[0]
                    os.kill(killed, signal.SIGKILL)
                time.sleep(0.01)
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert killed is not None
    assert process.returncode == 1, err
    assert json.loads(out)["failed"] == 1
    local = subprocess.run(
        command(rows, tmp_path / "local", toy_folder), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert local.returncode == 1, local.stderr
    ray, alone = OutputFolder.read(tmp_path / "ray"), OutputFolder.read(tmp_path / "local")
    assert list(ray.entries()) == list(alone.entries())
    assert [entry["prompt"] for entry in ray.entries() if "error" not in entry] == prompts
    for number in sorted(alone.published()):
        name = f"shard-{number:08}.tar"
        paths = [folder / name for folder in (ray.path, alone.path)]
        assert paths[0].exists() == paths[1].exists()
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes()
